from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from agq_gguf.errors import HostError, InputError
from agq_gguf.logits import compare, log_softmax
from agq_gguf.measure.evaluate import evaluate, summarize
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.model import Batch, Model
from agq_gguf.runtime.stock_quantize import quantize_stock
from agq_gguf.text import read_text

CONTEXT = 64
CHUNKS = 3


def test_log_softmax_is_exact_far_from_zero() -> None:
    logits = np.array([[1e4, 1e4 + 1, -1e4], [-3e4, -3e4, -3e4]], np.float32)
    probabilities = np.exp(log_softmax(logits))
    e = np.exp(1.0)
    assert np.allclose(probabilities, [[1 / (1 + e), e / (1 + e), 0], [1 / 3] * 3], rtol=1e-12)


def test_compare_agrees_with_the_definition() -> None:
    rng = np.random.default_rng(3)
    p_logits, q_logits = rng.normal(size=(2, 5, 11)).astype(np.float32)
    targets = np.array([0, 3, 10, 5, 5], np.int32)
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (p_logits, q_logits)
    )
    rows = compare(p_logits, q_logits, targets)
    each = np.arange(5)
    assert np.allclose(rows[:, 0], -np.log(p[each, targets]))
    assert np.allclose(rows[:, 1], -np.log(q[each, targets]))
    assert np.allclose(rows[:, 2], (p * np.log(p / q)).sum(1))
    assert (rows[:, 3] == (p.argmax(1) == q.argmax(1))).all()


def test_a_model_equals_itself(llama_f16: Path, words: str) -> None:
    found = evaluate(llama_f16, llama_f16, words, context=CONTEXT, chunks=CHUNKS, threads=1)
    assert (found.mean_kl, found.median_kl, found.kl_999, found.max_kl) == (0, 0, 0, 0)
    assert found.top1_agreement == 1
    assert found.perplexity == found.reference_perplexity > 1
    assert (found.chunks, found.positions) == (CHUNKS, CHUNKS * (CONTEXT // 2 - 1))


def _logits(path: Path, words: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets of the scored positions, by way of `llama_cpp.Llama`."""
    import llama_cpp

    llama = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_threads=1, logits_all=True, verbose=False)
    tokens = llama.tokenize(words.encode())
    logits, targets = [], []
    for chunk in range(CHUNKS):
        piece = tokens[chunk * CONTEXT : (chunk + 1) * CONTEXT]
        llama.reset()
        llama.eval([llama.token_bos(), *piece[1:]])
        logits.append(np.array(llama.scores[CONTEXT // 2 : CONTEXT - 1]))
        targets.append(piece[CONTEXT // 2 + 1 :])
    llama.close()
    return np.concatenate(logits).astype(np.float64), np.concatenate(targets)


def test_figures_equal_an_independent_computation(llama_f16: Path, llama_q8: Path, words: str) -> None:
    found = evaluate(llama_q8, llama_f16, words, context=CONTEXT, chunks=CHUNKS, threads=1, flash_attention="off")
    (reference, targets), (model, _) = _logits(llama_f16, words), _logits(llama_q8, words)
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (reference, model))
    p /= p.sum(1, keepdims=True)
    q /= q.sum(1, keepdims=True)
    kl = (p * np.log(p / q)).sum(1)
    each = np.arange(len(targets))
    assert found.positions == len(targets)
    assert found.perplexity == pytest.approx(np.exp(-np.log(q[each, targets]).mean()), rel=1e-6)
    assert found.reference_perplexity == pytest.approx(np.exp(-np.log(p[each, targets]).mean()), rel=1e-6)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-5)
    assert found.median_kl == pytest.approx(np.median(kl), rel=1e-5)
    assert found.kl_percentiles == pytest.approx(np.percentile(kl, np.arange(101)), rel=1e-5)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-5)
    assert found.top1_agreement == (p.argmax(1) == q.argmax(1)).mean()


def test_worse_types_are_further_away(llama_f16: Path, llama_q8: Path, llama_q4: Path, words: str) -> None:
    q8, q4 = (
        evaluate(path, llama_f16, words, context=CONTEXT, chunks=CHUNKS, threads=1) for path in (llama_q8, llama_q4)
    )
    assert 0 < q8.mean_kl < q4.mean_kl / 10
    assert q8.top1_agreement > q4.top1_agreement


def test_our_type_is_evaluated(llama_f16: Path, llama_agq: Path, llama_q4: Path, words: str) -> None:
    agq, q4 = (
        evaluate(path, llama_f16, words, context=CONTEXT, chunks=CHUNKS, threads=1) for path in (llama_agq, llama_q4)
    )
    assert 0 < agq.mean_kl < q4.mean_kl


def test_context_follows_the_model(gpt2_f16: Path, words: str) -> None:
    assert evaluate(gpt2_f16, gpt2_f16, words, chunks=1, threads=1).context == 256
    with pytest.raises(InputError, match="at most 256 tokens"):
        evaluate(gpt2_f16, gpt2_f16, words, context=512, threads=1)


@pytest.mark.parametrize(
    ("text", "context", "message"),
    [("the red key", 64, "at least 64 tokens"), ("the red key in the box", 2, "at least 4 tokens, got 2")],
)
def test_text_too_short(llama_f16: Path, text: str, context: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(llama_f16, llama_f16, text, context=context, threads=1)


def test_different_tokenizers(llama_f16: Path, gpt2_f16: Path, words: str) -> None:
    with pytest.raises(InputError, match="different tokenizers"):
        evaluate(gpt2_f16, llama_f16, words, context=CONTEXT, threads=1)


def test_encoders_have_no_next_token(bert_f16: Path, words: str) -> None:
    with pytest.raises(InputError, match="encoder"):
        evaluate(bert_f16, bert_f16, words, context=CONTEXT, threads=1)


def test_logits_that_are_no_numbers() -> None:
    rows = np.array([[1.0, np.nan, np.nan, 0.0]])
    with pytest.raises(InputError, match="logits of the model"):
        summarize(rows, 4, 1)


def test_perplexity_of_nonsense_is_infinite() -> None:
    found = summarize(np.array([[1.0, 5000.0, 4999.0, 0.0]]), 4, 1)
    assert found.perplexity == np.inf
    assert dataclasses.asdict(found)["mean_kl_error"] == 0


def test_read_text(tmp_path: Path) -> None:
    for content, message in ((b"", "empty"), (b" \n", "empty"), (b"ab\xff", "not UTF-8")):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_text(path)
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "none.txt")


# host.py


def test_the_log_of_llama_cpp_goes_to_our_logger(
    llama_f16: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("DEBUG", "agq_gguf.llama"), Model(llama_f16):
        pass
    assert any("llama_model_loader" in record.message for record in caplog.records)
    assert capfd.readouterr() == ("", "")


def test_the_previous_log_callback_comes_back(llama_f16: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import llama_cpp

    with Model(llama_f16), quiet_log():
        pass
    llama_cpp.Llama(str(llama_f16), n_ctx=32, n_threads=1, verbose=True).close()
    assert "llama_model_loader" in capfd.readouterr().err


def test_a_tokenizer_gives_room(llama_f16: Path, words: str) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(str(llama_f16), vocab_only=True, verbose=False)
    with Model(llama_f16, vocab_only=True) as model:
        assert model.tokenize(words).tolist() == llama.tokenize(words.encode())
        assert model.tokenize("").tolist() == [model.bos]
    llama.close()


def test_mmap_and_batches_do_not_matter(llama_f16: Path) -> None:
    rows = []
    for use_mmap, n_ubatch in ((True, 512), (False, 512), (True, 8)):
        with (
            Model(llama_f16, use_mmap=use_mmap) as model,
            model.context(32, n_ubatch=n_ubatch, threads=1) as context,
        ):
            batch = Batch(np.arange(300, 332), first_logits=30)
            context.decode(batch)
            rows.append(context.logits(batch).copy())
    assert rows[0].shape == (2, 512)
    assert np.array_equal(rows[0], rows[1])
    assert np.allclose(rows[0], rows[2], atol=1e-3)


def test_a_full_context_is_an_error(llama_f16: Path) -> None:
    with Model(llama_f16) as model, model.context(256, threads=1) as context:
        context.decode(Batch(np.full(256, 300)))
        with pytest.raises(HostError, match="context is full"):
            context.decode(Batch([300], first_position=256))


def test_a_model_that_llama_cpp_refuses(llama_f16: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed.gguf"
    path.write_bytes(llama_f16.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight"))
    with pytest.raises(InputError, match=r"cannot load this model: .*blk\.1\.attn_q"):
        Model(path)


def test_the_eval_callback_sees_the_graph(llama_f16: Path) -> None:
    asked: list[bool] = []

    def watch(tensor: int, ask: bool) -> bool:
        asked.append(ask)
        return ask and len(asked) == 1  # wants the data of the first node only

    with Model(llama_f16) as model, model.context(32, threads=1, eval_callback=watch) as context:
        context.decode(Batch([300]))
    assert True in asked


def test_stock_types(llama_f16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"type must be one of .*, got 'q9'"):
        quantize_stock(llama_f16, tmp_path / "x.gguf", "q9")
