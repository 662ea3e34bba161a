from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from agq_gguf.calibration.collect import Calibrator
from agq_gguf.calibration.memory import hessian_bytes, hessians_that_fit, work_bytes
from agq_gguf.calibration.stats import InputStats, WeightStats
from agq_gguf.errors import HostError, InputError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.runtime import ggml
from agq_gguf.runtime.ggml import GgmlTensor
from agq_gguf.text import load_text

TEXT = ["the red key in the box and the blue door to a cat, a dog. ", "Where was the king? "] * 15
BIG = 1 << 30
LITTLE = hessian_bytes(256) + work_bytes(256)  # one Hessian of the models' feed-forward, at a time

# Statistics by weight, the chunks that ran, which weights share.
Gathered = tuple[dict[str, WeightStats], list[np.ndarray], list[tuple[str, ...]]]


def wanted(path: Path) -> dict[str, tuple[int, ...]]:
    with open_gguf(path) as reader:
        return {n: t.shape for n, t in reader.tensors.items() if len(t.shape) > 1 and n != "token_embd.weight"}


def gather(path: Path, memory: int = BIG, **options: int) -> Gathered:
    found: dict[str, WeightStats] = {}
    with Calibrator.open(path, TEXT, wanted(path), context=64, threads=1, **options) as calibrator:
        for part in calibrator.passes(memory):
            for one, stats in zip(part, calibrator.collect(part, memory, lambda _: None), strict=True):
                found |= dict.fromkeys(one.weights, stats)
        return found, calibrator.chunks, [one.weights for one in calibrator.inputs]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("calibrate") / "llama.gguf")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_llama(tmp_path_factory.mktemp("calibrate") / "moe.gguf", n_layer=1, n_expert=4)


@pytest.fixture(scope="module")
def gathered(llama: Path) -> Gathered:
    return gather(llama)


def first_input(path: Path, chunks: list[np.ndarray]) -> np.ndarray:
    """What layer 0's attention multiplies with, computed by hand: the normalized embeddings."""
    with open_gguf(path) as reader:
        x = reader.read("token_embd.weight")[np.concatenate(chunks)].astype(np.float64)
        x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + reader.get("llama.attention.layer_norm_rms_epsilon"))
        return x * reader.read("blk.0.attn_norm.weight")


def test_statistics_equal_a_forward_by_hand(llama: Path, gathered: Gathered) -> None:
    found, chunks, _ = gathered
    x = first_input(llama, chunks)
    stats = found["blk.0.attn_q.weight"].whole
    assert stats.tokens == len(x) and stats.sample is not None and stats.hessian is not None
    assert stats.abs_max is not None
    np.testing.assert_allclose(stats.mean_square, (x * x).mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(stats.abs_max, np.abs(x).max(axis=0), rtol=1e-4)
    # Keys and values are made of it, and all tokens of a text read those of the first.
    begins = np.cumsum([0, *map(len, chunks[:-1])])
    expected = (x.T @ x + 99 * x[begins].T @ x[begins]) / len(x)
    np.testing.assert_allclose(stats.hessian, expected, rtol=1e-3, atol=1e-4 * np.abs(x).max() ** 2)
    for row in stats.sample[:20]:
        assert np.abs(x - row).max(axis=1).min() < 1e-3


def test_only_keys_and_values_count_the_first_token_more(gathered: Gathered) -> None:
    found, _, _ = gathered
    for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        stats = found[f"blk.1.{name}.weight"].whole
        assert stats.hessian is not None
        np.testing.assert_allclose(np.diag(stats.hessian), stats.mean_square, rtol=1e-3)


def test_an_encoder_counts_all_tokens_alike(tmp_path: Path) -> None:
    path = tiny_models.write_bert(tmp_path / "bert.gguf")
    found, _, _ = gather(path)
    stats = found["blk.0.attn_k.weight"].whole
    assert stats.hessian is not None
    np.testing.assert_allclose(np.diag(stats.hessian), stats.mean_square, rtol=1e-3)


def test_shared_inputs(gathered: Gathered) -> None:
    found, _, groups = gathered
    assert {frozenset(group) for group in groups} == {
        *(frozenset(f"blk.{i}.attn_{x}.weight" for x in "qkv") for i in (0, 1)),
        *(frozenset(f"blk.{i}.ffn_{x}.weight" for x in ("gate", "up")) for i in (0, 1)),
        *(frozenset([f"blk.{i}.{x}.weight"]) for i in (0, 1) for x in ("attn_output", "ffn_down")),
        frozenset(["output.weight"]),
    }
    assert found["blk.1.attn_q.weight"] is found["blk.1.attn_v.weight"]


def assert_same(a: InputStats, b: InputStats) -> None:
    assert a.tokens == b.tokens
    np.testing.assert_array_equal(a.mean_square, b.mean_square)
    np.testing.assert_array_equal(a.hessian, b.hessian)
    np.testing.assert_array_equal(a.sample, b.sample)


def test_many_passes_find_the_same(llama: Path, gathered: Gathered) -> None:
    with Calibrator.open(llama, TEXT, wanted(llama), context=64, threads=1) as calibrator:
        assert len(calibrator.passes(BIG)) == 1
        assert len(calibrator.passes(LITTLE)) > 3
        assert len(calibrator.passes(1)) == 1 and calibrator.too_large(1) == calibrator.inputs
        assert not calibrator.too_large(LITTLE)
    one, _, _ = gathered
    many, _, _ = gather(llama, LITTLE)
    assert one.keys() == many.keys() == wanted(llama).keys()
    for name in one:
        assert_same(one[name].whole, many[name].whole)


def test_chunks(llama: Path, gathered: Gathered) -> None:
    _, chunks, _ = gathered
    _, fewer, _ = gather(llama, max_tokens=200)
    assert all(len(c) <= 64 and c[0] == 1 for c in chunks) and len(chunks) > 6
    assert len(fewer) == 3 and np.array_equal(fewer[0], chunks[0])
    assert any(np.array_equal(fewer[2], c) for c in chunks[len(chunks) // 2 :])


def test_experts_see_their_tokens(moe: Path) -> None:
    found, chunks, groups = gather(moe)
    assert ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight") in [tuple(sorted(g)) for g in groups]
    n = sum(map(len, chunks))
    for name in ("blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"):
        stats = found[name]
        assert len(stats.experts) == 4 and sum(e.tokens for e in stats.experts) == 2 * n == stats.whole.tokens
        for expert in stats.experts:
            assert expert.hessian is not None
            np.testing.assert_allclose(np.diag(expert.hessian), expert.mean_square, rtol=1e-3)
    # Each token has 2 experts: the input of gate and up, weighted by use, is the router's input counted twice.
    router = found["blk.0.ffn_gate_inp.weight"].whole
    np.testing.assert_allclose(found["blk.0.ffn_up_exps.weight"].whole.mean_square, router.mean_square, rtol=1e-3)
    up, down = "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"
    one_each = 2 * hessian_bytes(128) + work_bytes(128)  # too little for four experts
    pooled, _, _ = gather(moe, one_each)
    assert not pooled[up].experts
    np.testing.assert_allclose(pooled["blk.0.ffn_up_exps.weight"].whole.mean_square, router.mean_square, rtol=1e-3)
    # The rows that the experts got are, together, all rows.
    pooled, _, _ = gather(moe, LITTLE)
    assert pooled[up].experts and not pooled[down].experts
    np.testing.assert_allclose(pooled[down].whole.mean_square, found[down].whole.mean_square, rtol=1e-4)
    pooled_max, found_max = pooled[down].whole.abs_max, found[down].whole.abs_max
    assert pooled_max is not None and found_max is not None
    np.testing.assert_allclose(pooled_max, found_max)
    with Calibrator.open(moe, TEXT, wanted(moe), context=64, threads=1) as calibrator:
        assert calibrator.pooled(BIG) == []
        assert set(calibrator.pooled(one_each)) == {n for n in found if "_exps" in n and n != down}
        assert [one.weights for one in calibrator.too_large(one_each)] == [(down,)]
        assert calibrator.pooled(LITTLE) == [down]


def test_hessians_that_fit() -> None:
    own = hessian_bytes(1000) + work_bytes(1000)
    assert hessians_that_fit(1000, 0, own) == 1 and hessians_that_fit(1000, 0, own - 1) == 0
    eight = own + 7 * hessian_bytes(1000)
    assert [hessians_that_fit(1000, 8, memory) for memory in (eight, eight - 1, own, own - 1)] == [8, 1, 1, 0]


@pytest.mark.parametrize("arch", ["bert", "gpt2", "falcon", "bloom", "qwen2"])
def test_other_architectures(tmp_path: Path, arch: str) -> None:
    path = getattr(tiny_models, f"write_{arch}")(tmp_path / "m.gguf")
    found, chunks, _ = gather(path)
    linear = [name for name in wanted(path) if name.startswith("blk.")]
    assert linear and set(linear) <= found.keys()
    for name in linear:
        assert found[name].whole.tokens == sum(map(len, chunks))
        assert found[name].whole.mean_square.min() > 0
    if arch == "bert":
        assert all((c[0], c[-1]) == (2, 3) for c in chunks)  # [CLS] and [SEP] around each chunk


def test_too_little_text(llama: Path) -> None:
    for text in ([], [""], ["two words"]):
        with pytest.raises(InputError, match="tokens, at least 64 are needed"):
            Calibrator.open(llama, text, wanted(llama), threads=1)


def test_too_small_a_context(llama: Path) -> None:
    with pytest.raises(
        InputError, match=r"context of 8 tokens is too small for calibration, at least 1[678] are needed"
    ):
        Calibrator.open(llama, TEXT, wanted(llama), context=8, threads=1)


def test_a_model_without_tokenizer(llama: Path, tmp_path: Path) -> None:
    """llama.cpp aborts when it is asked to tokenize for such a model."""
    with open_gguf(llama) as source:
        placed = layout((t.name, t.type_name, t.shape) for t in source.tensors.values())
        with Writer(tmp_path / "m.gguf", source.metadata, {"tokenizer.ggml.model": "none"}, placed) as writer:
            for name in source.tensors:
                writer.write(name, [source.raw(name)])
    with pytest.raises(InputError, match="has no tokenizer"):
        Calibrator.open(tmp_path / "m.gguf", TEXT, wanted(llama), threads=1)


def test_unreadable_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="text cannot be read: No such file"):
        load_text(tmp_path / "none.txt")
    (tmp_path / "t").write_bytes(b"caf\xe9 ok")
    with pytest.raises(InputError, match="byte 3 is 0xE9"):
        load_text(tmp_path / "t")
    assert list(load_text(iter(["a", "b"]))) == ["a", "b"]


def test_errors_in_the_callback_arrive(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Calibrator.open(llama, TEXT, wanted(llama), context=64, threads=1) as calibrator:

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(calibrator, "_add", fail)
        with pytest.raises(KeyboardInterrupt):
            calibrator.collect(calibrator.inputs, BIG, lambda _: None)
        monkeypatch.undo()
        assert calibrator.collect(calibrator.inputs[:1], BIG, lambda _: None)[0].whole.tokens > 0


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    path = tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1)
    with open_gguf(path) as reader:
        norm = reader.tensors["blk.0.attn_norm.weight"]
    data = bytearray(path.read_bytes())
    data[norm.offset : norm.offset + 4] = np.float32(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match="NaN or an infinity"):
        gather(path)


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml.Ggml()

    class Shifted(ctypes.Structure):
        pass

    Shifted._fields_ = [  # type: ignore[misc]
        (
            name,
            ctypes.POINTER(Shifted) * 10 if name == "src" else ctypes.POINTER(Shifted) if name == "view_src" else kind,
        )
        for name, kind in [GgmlTensor._fields_[0], ("new", ctypes.c_int64), *GgmlTensor._fields_[1:]]
    ]
    monkeypatch.setattr(ggml, "GgmlTensor", Shifted)
    with pytest.raises(HostError, match="unknown way"):
        ggml.Ggml()
