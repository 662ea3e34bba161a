"""Factors moved from norms into matrices: arithmetic, detection in llama.cpp's graph, and the point of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from typer.testing import CliRunner

from agq_gguf.calibration.collect import Calibrator
from agq_gguf.calibration.stats import InputStats
from agq_gguf.cli.app import app
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.matrix import equalize
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize


def inject(source: Path, target: Path, factor: float, channels: int = 4) -> Path:
    """The same function with outliers: some channels of each norm times `factor`, columns behind it divided."""
    behind = {"attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"), "ffn_norm": ("ffn_gate", "ffn_up")}
    with open_gguf(source) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
        rng = np.random.default_rng(0)
        for layer in range(int(reader.get(f"{reader.architecture}.block_count"))):
            for norm, matrices in behind.items():
                chosen = rng.choice(len(tensors[f"blk.{layer}.{norm}.weight"]), channels, replace=False)
                for part in ("weight", "bias"):
                    if f"blk.{layer}.{norm}.{part}" in tensors:
                        tensors[f"blk.{layer}.{norm}.{part}"][chosen] *= factor
                for name in matrices:
                    if f"blk.{layer}.{name}.weight" in tensors:
                        tensors[f"blk.{layer}.{name}.weight"][:, chosen] /= factor
        placed = layout((name, "f32", values.shape) for name, values in tensors.items())
        with Writer(target, reader.metadata, {}, placed) as writer:
            for name, values in tensors.items():
                writer.write(name, [values])
    return target


def test_factors_do_not_depend_on_how_a_model_shares_them_out() -> None:
    rng = np.random.default_rng(1)
    square = np.exp(rng.normal(size=128)).astype(np.float32)
    weights = [rng.normal(size=(m, 128)).astype(np.float32) for m in (32, 16)]
    s = equalize.factors(square, weights)
    assert np.isclose(np.log(s).mean(), 0, atol=1e-5)
    given = np.exp(rng.normal(size=128)).astype(np.float32)
    other = equalize.factors(square * given**2, [w / given for w in weights])
    ratio = other / (s * given)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_factors_of_silent_and_unused_channels() -> None:
    square = np.ones(128, np.float32)
    square[3] = 0
    weights = np.ones((16, 128), np.float32)
    weights[:, 5] = 0
    s = equalize.factors(square, [weights])
    assert s[5] == 1 and 0.05 < s[3] < 0.2 and np.ptp(np.delete(s, [3, 5])) == 0
    assert np.array_equal(equalize.factors(square * 0, [weights]), np.ones(128, np.float32))


@pytest.mark.parametrize("scale", blocks.ACTIVATION_SCALES)
def test_only_outliers_are_equalized(scale: str) -> None:
    rng = np.random.default_rng(2)
    sample = rng.normal(size=(256, 256)).astype(np.float32)
    weights = [rng.normal(size=(64, 256)).astype(np.float32)]

    def chosen(factor: float) -> np.ndarray | None:
        d = np.ones(256, np.float32)
        d[::64] = factor
        stats = InputStats(256, np.square(sample * d).mean(0), None, sample * d)
        return equalize.choose(stats, [("agq4", weights[0] / d)], 0, 8, scale, True)

    assert chosen(1) is None and chosen(1.5) is None
    s = chosen(30)
    assert s is not None and s[64] > 20 * s[65]


EXPECTED = {
    "llama": {"blk.0.attn_q.weight": ("blk.0.attn_norm.weight",), "blk.0.ffn_gate.weight": ("blk.0.ffn_norm.weight",)},
    "gpt2": {
        "blk.0.attn_qkv.weight": ("blk.0.attn_norm.bias", "blk.0.attn_norm.weight"),
        "blk.0.ffn_up.weight": ("blk.0.ffn_norm.bias", "blk.0.ffn_norm.weight"),
    },
    # One input for attention and FFN; BERT normalizes the residual stream itself, which nobody may scale.
    "falcon": {"blk.0.attn_qkv.weight": ("blk.0.attn_norm.bias", "blk.0.attn_norm.weight")},
    "bert": {},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_norms_are_found_in_the_graph(name: str, tmp_path: Path, words: str) -> None:
    path = getattr(tiny_models, f"write_{name}")(tmp_path / "m.gguf")
    with open_gguf(path) as reader:
        wanted = {
            n: t.shape
            for n, t in reader.tensors.items()
            if n.startswith("blk.0") and "norm" not in n and len(t.shape) > 1
        }
    with Calibrator.open(path, [words], wanted, context=64, max_tokens=64, threads=1) as calibrator:
        found = {entry.weights[0]: entry.norms for entry in calibrator.inputs if entry.norms}
    assert found == EXPECTED[name]


def test_a_router_keeps_its_input(tmp_path: Path, words: str) -> None:
    path = tiny_models.write_llama(tmp_path / "moe.gguf", n_layer=1, n_expert=4, n_expert_used=2)
    with open_gguf(path) as reader:
        wanted = {n: t.shape for n, t in reader.tensors.items() if "_exps" in n}
    with Calibrator.open(path, [words], wanted, context=64, max_tokens=64, threads=1) as calibrator:
        assert [entry.norms for entry in calibrator.inputs] == [()] * len(calibrator.inputs)


@pytest.mark.parametrize(
    ("quality", "arch"),
    [("balanced", "llama"), ("best", "llama"), pytest.param("best", "bloom", marks=pytest.mark.slow)],
)
def test_outliers_do_no_harm(quality: str, arch: str, llama_f16: Path, words: str, tmp_path: Path) -> None:
    """A model whose norms carry huge channels, but computes the same, is quantized as well as the plain one."""
    exact = llama_f16 if arch == "llama" else tiny_models.write_bloom(tmp_path / "bloom.gguf")
    loud = inject(exact, tmp_path / "loud.gguf", 64)
    assert evaluate(loud, exact, words, context=64, chunks=2, threads=1).mean_kl < 1e-5
    found = {}
    for name, source, equalized in (("plain", exact, True), ("loud", loud, True), ("without", loud, False)):
        options = QuantizeOptions(
            quality=quality,
            matrix=MatrixOptions(equalize=equalized),
            threads=1,
            context=64,
            calibration_tokens=1024,
        )
        out = tmp_path / f"{name}-agq4.gguf"
        quantize(source, out, calibration=[words], options=options)
        found[name] = evaluate(out, exact, words, context=64, chunks=8, threads=1).mean_kl
    assert found["loud"] < 1.2 * found["plain"]
    if arch == "llama":  # rotation alone does most of it for a BLOOM that is as tiny
        assert 1.2 * found["plain"] < 0.5 * found["without"]


@pytest.mark.parametrize("keep", [False, True])
def test_norms_can_be_kept_for_adapters(tmp_path: Path, keep: bool) -> None:
    plain = tiny_models.write_llama(tmp_path / "plain.gguf", dtype="f32", n_layer=1)
    source = inject(plain, tmp_path / "in.gguf", 64)
    (tmp_path / "text").write_text("the red key in the box and the blue door " * 60, encoding="utf-8")
    arguments = ["quantize", str(source), str(tmp_path / "out.gguf"), "--calibration", str(tmp_path / "text")]
    result = CliRunner().invoke(app, [*arguments, "-t", "1", "--quality", "fast", *(["--keep-norms"] if keep else [])])
    assert result.exit_code == 0, result.output
    assert ("adjusted together with the matrices" in result.output) != keep
    with open_gguf(source) as before, open_gguf(tmp_path / "out.gguf") as after:
        same = [bytes(before.raw(f"blk.0.{x}_norm.weight")) == bytes(after.raw(f"blk.0.{x}_norm.weight"))
                for x in ("attn", "ffn")]  # fmt: skip
        assert same == [keep, keep]
