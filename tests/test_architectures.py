"""Every kind of graph that llama.cpp builds: quantized models run in the plugin, near what their weights say.

The reference is the AGQ4 file itself with its weights dequantized to F32, run by stock llama.cpp code. What is left
between the two is the rounding of activations to 8 bits, some 1% of each product; a wrong product, bias, expert or
position would be ten times that. Four-bit rounding of the weights (some 10% of each product) is in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import architectures
import gguf
import numpy as np
import pytest
import tiny_models

import agq_gguf
from agq_gguf.calibration.collect import Calibrator
from agq_gguf.calibration.memory import hessian_bytes, work_bytes
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.quantization.report import Report
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.model import Batch, Model

# AGQ4 wherever it can be; learning a codebook takes most of the time, and these tests do not need it.
OPTIONS = QuantizeOptions(
    output_type="agq4",
    embedding_type="agq4",
    threads=1,
    calibration_tokens=512,
    matrix=MatrixOptions(learn_codebook=False),
)
N_TOKENS = 40  # more than the sliding windows of the models, and than the 32 rows from which attention is our own


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    agq_gguf.register()
    with quiet_log():
        yield


def dequantized(source: Path) -> Path:
    """Writes the model with its AGQ4 tensors as F32 and all others as they are."""
    target = source.with_name(f"{source.stem}-dequantized.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    with open_gguf(source) as reader:
        placed = layout(
            (name, "f32" if tensor.type_name == blocks.TYPE_NAME else tensor.type_name, tensor.shape)
            for name, tensor in reader.tensors.items()
        )
        with Writer(target, reader.metadata, {}, placed) as writer:
            for name, tensor in reader.tensors.items():
                if tensor.type_name == blocks.TYPE_NAME:
                    values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
                    writer.write(name, [values.astype(np.float32)])
                else:
                    writer.write(name, [reader.raw(name)])
    return target


def quantized(source: Path, text: str) -> tuple[Path, Report]:
    """The model in AGQ4, calibrated."""
    target = source.with_name(f"{source.stem}-agq4.gguf")
    return target, quantize(source, target, calibration=[text], options=OPTIONS)


def logits_of(path: Path, *, encoder_text: bool = False) -> np.ndarray:
    """Logits [N_TOKENS, vocabulary] of a fixed text, in two batches as a prompt and more of it."""
    tokens = np.random.default_rng(0).integers(260, 330, N_TOKENS).astype(np.int32)
    with Model(path) as model, model.context(256, threads=1) as context:
        if encoder_text:
            context.encode(Batch(tokens[::-1], first_logits=0))
        found = []
        for begin, end in ((0, N_TOKENS - 3), (N_TOKENS - 3, N_TOKENS)):
            batch = Batch(tokens[begin:end], first_position=begin, first_logits=0)
            context.decode(batch)
            found.append(context.logits(batch).copy())
    return np.concatenate(found)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Size of the difference to the size of the logits, of the typical token: another expert may be chosen at some."""
    return float(np.median(np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)))


def check_pruning(name: str, path: Path) -> None:
    """Half of a prompt dropped behind the first layer: as if later layers did not see those tokens."""

    def last_logits(prune: str) -> np.ndarray:
        tokens = np.random.default_rng(1).integers(260, 330, 100).astype(np.int32)
        with agq_gguf.options(prune=prune), Model(path) as model, model.context(256, threads=1) as context:
            batch = Batch(tokens)
            context.decode(batch)
            return context.logits(batch).copy()

    whole, masked, pruned = last_logits("off"), last_logits("mask,0:0.5"), last_logits("0:0.5")
    if name in NOT_PRUNED:
        assert np.array_equal(pruned, whole)
    else:
        assert error(pruned, masked) < 1e-3 < error(pruned, whole)


NOT_PRUNED = ("mamba",)  # no attention

# What of each model is AGQ4: all matrices, but for the two that cannot be.
COUNTS = {
    **dict.fromkeys(("llama", "halves", "qwen2", "qwen3", "mixtral", "qwen3moe"), 16),
    **dict.fromkeys(("gpt2", "bloom", "falcon", "mpt"), 9),
    **dict.fromkeys(("gemma2", "gemma3"), 15),
    "phi3": 10,
    "starcoder2": 13,
    "mamba": 8,
    "odd": 2,
}


@pytest.mark.parametrize("name", architectures.DECODERS)
def test_decoders_say_what_their_weights_say(name: str, tmp_path: Path, words: str) -> None:
    source = architectures.DECODERS[name](tmp_path / f"{name}.gguf")
    path, report = quantized(source, words)
    assert report.by_type()["agq4"][0] == COUNTS[name]
    assert [w for w in report.warnings if "calibrated on" not in w] == []  # statistics for all, experts kept apart
    assert all(tensor.error is not None for tensor in report.tensors if tensor.type_name == "agq4")
    found, wanted, original = logits_of(path), logits_of(dequantized(path)), logits_of(source)
    assert error(found, wanted) < 0.06
    assert error(found, wanted) < error(wanted, original) / 2
    assert error(found, original) < 0.45
    check_pruning(name, path)


# Tensors of the field's architectures that stay floats, because llama-quantize keeps them, too.
SMALL = {
    "one-dimensional", "norm", "router", "convolution", "recurrent state", "small low-rank or mixing matrix", "bias",
    "not a weight",
}  # fmt: skip


@pytest.mark.parametrize("name", architectures.FIELD)
def test_architectures_of_the_field(name: str, tmp_path: Path, words: str) -> None:
    source = architectures.FIELD[name](tmp_path / f"{name}.gguf")
    path, report = quantized(source, words)
    floats = {t.name: t.reason for t in report.tensors if t.type_name in ("f32", "f16")}
    assert {name: why for name, why in floats.items() if why.split(";")[0] not in SMALL} == {}
    found, wanted, original = logits_of(path), logits_of(dequantized(path)), logits_of(source)
    assert error(found, wanted) < 0.1
    assert error(found, wanted) < error(wanted, original) / 2


def test_tables_and_experts_of_all_names(tmp_path: Path) -> None:
    """What once stayed F16 or F32 by oversight."""

    def types(name: str) -> dict[str, str]:
        source = architectures.FIELD[name](tmp_path / f"{name}.gguf")
        return {plan.source.name: plan.type_name for plan in plan_file(source, QuantizeOptions())}

    assert types("gemma3n")["per_layer_token_embd.weight"] == "q8_0"  # 512 columns; AGQ4 from 1024 on
    assert types("grovemoe")["blk.1.ffn_up_chexps.weight"] == "agq4"
    latent = types("deepseek2")
    assert latent["blk.0.attn_k_b.weight"] == latent["blk.1.attn_v_b.weight"] == "q8_0"


def test_what_cannot_be_agq4_says_why(tmp_path: Path) -> None:
    def reasons(name: str) -> dict[str, tuple[str, str]]:
        source = architectures.DECODERS[name](tmp_path / f"{name}.gguf")
        report = quantize(source, tmp_path / f"{name}-agq4.gguf", options=OPTIONS)
        return {tensor.name: (tensor.type_name, tensor.reason) for tensor in report.tensors if tensor.reason}

    mamba = reasons("mamba")
    assert "blk.0.ssm_x.weight" not in mamba
    # 8 columns, fewer than a block of Q8_0
    assert mamba["blk.0.ssm_dt.weight"] == ("f16", "small and sensitive; q8_0 needs a multiple of 32 columns")
    assert mamba["blk.0.ssm_conv1d.weight"] == ("f32", "convolution")
    assert mamba["blk.0.ssm_a"] == ("f32", "not a weight")
    odd = reasons("odd")
    assert odd["blk.1.attn_q.weight"] == ("q8_0", "columns must be a multiple of 64, got 160")
    assert odd["output.weight"] == ("q8_0", "columns must be a multiple of 64, got 160")
    assert "blk.0.ffn_down.weight" not in odd


def test_encoder_embeddings(tmp_path: Path, words: str) -> None:
    from llama_cpp import Llama

    source = tiny_models.write_bert(tmp_path / "bert.gguf", dtype="f32")
    path, report = quantized(source, words)
    assert report.by_type()["agq4"][0] == 13
    vectors = []
    for model in (path, dequantized(path), source):
        llama = Llama(str(model), embedding=True, n_ctx=128, n_threads=1, verbose=False)
        vectors.append(np.array([llama.embed(text) for text in ("the red key in the box", "who went to the house")]))
        llama.close()
    found, wanted, original = vectors
    assert error(found, wanted) < 0.04
    assert error(found, wanted) < error(wanted, original) / 2


def test_encoder_with_decoder(tmp_path: Path, words: str) -> None:
    source = architectures.write_t5(tmp_path / "t5.gguf")
    path, report = quantized(source, words)
    assert report.by_type()["agq4"][0] == 2 * (7 + 11) + 2
    assert [w for w in report.warnings if "calibrated on" not in w] == []
    paths = (path, dequantized(path), source)
    found, wanted, original = (logits_of(model, encoder_text=True) for model in paths)
    assert error(found, wanted) < 0.06
    assert error(found, wanted) < error(wanted, original) / 2


def test_calibration_of_encoder_and_decoder_in_several_passes(tmp_path: Path, words: str) -> None:
    """With little memory the inputs are gathered in several passes, of which some end within the encoder."""
    source = architectures.write_t5(tmp_path / "t5.gguf")
    with open_gguf(source) as reader:
        wanted = {name: tensor.shape for name, tensor in reader.tensors.items() if name.endswith("_q.weight")}
    with Calibrator.open(source, [words], wanted, max_tokens=512, threads=1) as calibrator:
        assert [len(found.weights) for found in calibrator.inputs] == [1] * 6
        together = calibrator.collect(calibrator.inputs, 1 << 30, lambda done: None)
        parts = calibrator.passes(2 * hessian_bytes(128) + work_bytes(128))
        assert [part[-1].weights[0].split(".")[0] for part in parts] == ["enc", "dec", "dec"]
        apart = [stats for part in parts for stats in calibrator.collect(part, 1 << 30, lambda done: None)]
    for one, other in zip(together, apart, strict=True):
        assert one.whole.tokens > 200
        assert np.array_equal(one.whole.mean_square, other.whole.mean_square)
