"""Checkpoints of LLaMA, OPT and BLOOM: the GGUF in llama.cpp must say and cut what transformers says and cuts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own deprecations
    import tiny_checkpoints as tiny
    import transformers

from transformers_logits import greedy, logits_of, pruned_logits, torch_logits

from agq_gguf.import_hf import import_checkpoint
from agq_gguf.import_hf.llama import interleave_halves
from agq_gguf.logits import compare
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.model import Model
from agq_gguf.runtime.text import TextModel

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def clear_text(model: Any, n_tokens: int) -> tuple[np.ndarray, list[int]]:
    """A text and its continuation of 8 tokens by transformers, none of which is a matter of rounding."""
    for seed in range(100):
        start = np.random.default_rng(seed).integers(8, n_tokens, 24).astype(np.int32)
        told, margin = greedy(lambda t: torch_logits(model, t), start, 8)
        if margin > 0.1:
            return start, told
    raise AssertionError("no text with clear choices")


# what is computed


@pytest.mark.parametrize("name", tiny.CASES)
def test_logits_and_greedy_text_equal_transformers(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, model, tokenizer = checkpoints(name)
    bound = tiny.CASES[name][2]
    tokens = np.random.default_rng(5).integers(8, len(tokenizer), 96).astype(np.int32)
    wanted = torch_logits(model, tokens)
    start, told = clear_text(model, len(tokenizer))
    for outtype in ("f16", "f32"):
        path = tmp_path / f"{outtype}.gguf"
        report = import_checkpoint(folder, path, outtype=outtype)
        assert report.n_parameters >= sum(p.numel() for p in set(model.parameters())) - 2 * 128  # OPT: two positions
        scored = compare(wanted, logits_of(path, tokens), tokens)
        assert scored[:, 2].mean() < bound, (outtype, scored[:, 2].mean())
        assert greedy(lambda t, path=path: logits_of(path, t), start, 8)[0] == told  # type: ignore[misc]


def test_half_precision_checkpoint_and_outtypes(own_checkpoint: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("llama")
    half = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    import_checkpoint(folder, tmp_path / "bf16.gguf", outtype="bf16")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "bf16.gguf").tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    # Bit for bit the weights of the checkpoint.
    stored = torch.from_numpy(tensors["blk.0.ffn_up.weight"].data.view(np.int16).copy()).view(torch.bfloat16)
    assert torch.equal(stored, half.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
def test_then_quantize_prune_and_generate(name: str, checkpoints: Any, tmp_path: Path, words_file: Path) -> None:
    folder, _, _ = checkpoints(name)
    import_checkpoint(folder, tmp_path / "f16.gguf")
    options = QuantizeOptions(threads=1, calibration_tokens=512, matrix=MatrixOptions(learn_codebook=False))
    report = quantize(tmp_path / "f16.gguf", tmp_path / "agq4.gguf", calibration=words_file, options=options)
    kinds = report.by_type()
    assert kinds["agq4"][0] == (14 if name == "llama" else 8)
    assert not report.warnings or "calibrated on" in report.warnings[0]
    tokens = np.random.default_rng(3).integers(8, 400, 100).astype(np.int32)
    wanted, found = logits_of(tmp_path / "f16.gguf", tokens), logits_of(tmp_path / "agq4.gguf", tokens)
    # Random weights are the hardest to quantize: 4 bits leave an error of some 8% in each of their products.
    assert 0.01 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.35
    whole, _ = pruned_logits(tmp_path / "agq4.gguf", tokens, "off")
    masked, _ = pruned_logits(tmp_path / "agq4.gguf", tokens, "mask,0:0.3")
    pruned, dropped = pruned_logits(tmp_path / "agq4.gguf", tokens, "0:0.3")
    assert dropped == 30
    assert np.linalg.norm(pruned - masked) < 1e-3 * np.linalg.norm(whole) < np.linalg.norm(pruned - whole)
    with TextModel(tmp_path / "agq4.gguf", threads=1) as model:
        said = "".join(model.continued("The king went to", tokens=8, temperature=0))
    assert len(said) > 4


# how text is cut


@pytest.mark.parametrize("name", ["llama", "llama3", "opt", "bloom"])
def test_tokens_equal_transformers(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, _, _ = checkpoints(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if name != "llama" else checkpoints(name)[2]
    report = import_checkpoint(folder, tmp_path / "out.gguf")
    assert report.warnings == []
    special = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    texts = tiny.NASTY + [f"in {s} text{s}{s} x" for s in special] + [f"{special[0]}first", f"last{special[-1]}"]
    texts.append("a lazyCat, lazyCats")  # a token of llama3 that no merges lead to
    with Model(tmp_path / "out.gguf", vocab_only=True) as model:
        for text in texts:
            assert model.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


@pytest.mark.parametrize(("name", "prefix"), [("llama", "<s>"), ("llama3", "<|begin_of_text|>"), ("opt", "</s>")])
def test_special_tokens_and_chat_template(name: str, prefix: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, _, tokenizer = checkpoints(name)
    import_checkpoint(folder, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")

    def value(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        return field.contents() if field else None

    tokens = value("ggml.tokens")
    assert tokens[value("ggml.bos_token_id")] == prefix
    assert tokens[value("ggml.eos_token_id")] == tokenizer.eos_token
    assert value("ggml.add_bos_token") is True
    assert value("ggml.add_eos_token") is False
    assert value("chat_template") == (None if name == "opt" else tiny.CHAT)
    kinds = value("ggml.token_type")
    assert kinds[tokens.index(prefix)] == gguf.TokenType.CONTROL
    assert tokens[-1].startswith("[PAD")
    assert kinds[-1] == gguf.TokenType.UNUSED
    if name == "llama3":
        assert kinds[tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_told(legacy: bool, tmp_path: Path) -> None:
    """LlamaTokenizer of transformers 5 adds no space to a text that begins with one; llama.cpp does."""
    tokenizer = tiny.llama_tokenizer(published=False, legacy=legacy)
    tiny.write(tmp_path / "in", tiny.llama_config(), tokenizer)
    report = import_checkpoint(tmp_path / "in", tmp_path / "out.gguf")
    assert any("begins with a space" in warning for warning in report.warnings)
    assert any("' leading and trailing '" in warning for warning in report.warnings)
    with Model(tmp_path / "out.gguf", vocab_only=True) as model:
        for text in tiny.NASTY:
            if not text.startswith(" "):
                assert model.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


def test_sentencepiece_file_alone(own_checkpoint: Any, checkpoints: Any, tmp_path: Path) -> None:
    folder = own_checkpoint("llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    report = import_checkpoint(folder, tmp_path / "out.gguf")
    assert report.warnings == []
    tokenizer = checkpoints("llama")[2]
    with Model(tmp_path / "out.gguf", vocab_only=True) as model:
        for text in [*tiny.NASTY, "<s> in text </s>"]:
            assert model.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


def test_vocabulary_and_merges_alone(own_checkpoint: Any, checkpoints: Any, tmp_path: Path) -> None:
    """As the checkpoints of OPT come: no tokenizer.json."""
    folder = own_checkpoint("opt")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert import_checkpoint(folder, tmp_path / "out.gguf").warnings == []
    tokenizer = checkpoints("opt")[2]
    with Model(tmp_path / "out.gguf", vocab_only=True) as host:
        for text in [*tiny.NASTY, "in </s> text<pad>"]:
            assert host.tokenize(text, parse_special=True).tolist() == tokenizer(text).input_ids, text


# the pieces


def test_interleaving_is_what_llama_cpp_rotates() -> None:
    """Row 2i of a head is row i of the checkpoint, row 2i + 1 row i + half."""
    rows = torch.arange(16)[:, None]
    assert interleave_halves(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
