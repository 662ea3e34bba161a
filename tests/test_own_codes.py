"""Weights that are 4-bit integers already: AGQ4 keeps the integers; all others are quantized as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_packed import Packer, pack

from agq_gguf.format import blocks, reference
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.import_hf import import_checkpoint
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.own_codes import keep
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SCALE_ERROR = 2.0**-7  # of a scale with 7 significant bits
Floats = NDArray[np.float32]


def bfloat16(values: Floats) -> Floats:
    """Rounded to BF16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def draw(rng: np.random.Generator, low: int, high: int, rows: int = 24, groups: int = 3) -> tuple[NDArray[Any], Floats]:
    """Integers in low..high [rows, 64 groups] and scales [rows, groups], some of them negative or zero."""
    integers = rng.integers(low, high + 1, (rows, groups * 64))
    scales = (rng.uniform(0.5, 2, (rows, groups)) * 2.0 ** rng.integers(-9, 3, (rows, 1))).astype(np.float32)
    scales *= rng.choice([-1, 1], scales.shape)
    scales[rng.random(scales.shape) < 0.05] = 0
    return integers, scales


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    limits=st.sampled_from([(-8, 7), (-7, 7), (-7, 8), (-1, 1), (0, 1), (-3, 5)]),
    stored=st.sampled_from(["f32", "f16", "bf16"]),
)
@example(seed=5997, limits=(-8, 7), stored="bf16")
def test_integers_are_kept(seed: int, limits: tuple[int, int], stored: str) -> None:
    integers, scales = draw(np.random.default_rng(seed), *limits)
    exact = (integers * scales.repeat(64, axis=1)).astype(np.float32)
    weight = {"f32": exact, "f16": exact.astype(np.float16).astype(np.float32), "bf16": bfloat16(exact)}[stored]
    made = keep(weight, MatrixOptions())
    assert made is not None and made.matrix.parameters.activation_scale == "group"
    restored = reference.dequantize(blocks.unpack(blocks.pack(made.matrix)))
    # Each weight was rounded, and so was the one that the scale of its group was taken from.
    rounded = SCALE_ERROR + 2 * {"f32": 0, "f16": 2.0**-11, "bf16": 2.0**-8}[stored]
    np.testing.assert_array_less(np.abs(restored - weight), 1.01 * rounded * np.abs(weight) + 1e-30)
    assert 0 <= made.error <= rounded**2


def test_scales_that_agq4_can_hold_lose_nothing() -> None:
    integers, _ = draw(np.random.default_rng(1), -8, 7)
    scales = 2.0 ** np.random.default_rng(2).integers(-6, 6, (24, 3)).astype(np.float32)
    weight = (integers * scales.repeat(64, axis=1)).astype(np.float32)
    made = keep(weight, MatrixOptions())
    assert made is not None and made.error == 0.0
    np.testing.assert_array_equal(reference.dequantize(made.matrix), weight)


@pytest.mark.parametrize("case", ["normal", "17 values", "a zero point", "groups of 32", "one weight", "nan", "zeros"])
def test_other_weights_are_not_kept(case: str) -> None:
    rng = np.random.default_rng(3)
    integers, scales = draw(rng, -8, 7)
    scales[scales == 0] = 1
    if case == "17 values":
        integers[5, 70:72] = (-8, 8)
    elif case == "a zero point":
        integers = integers + 3
    each = scales.repeat(64, axis=1)
    if case == "groups of 32":
        each[:, 32:64] *= np.float32(1.37)
    weight = (integers * each).astype(np.float32)
    if case == "normal":
        weight = rng.standard_normal(weight.shape).astype(np.float32)
    elif case == "one weight":
        weight[20, 150] += np.float32(0.4) * each[20, 150]
    elif case == "nan":
        weight[20, 150] = np.nan
    elif case == "zeros":
        weight[:] = 0
    assert keep(weight, MatrixOptions()) is None


def options(**changes: Any) -> QuantizeOptions:
    return QuantizeOptions(threads=1, allow_requantize=True, matrix=MatrixOptions(learn_codebook=False), **changes)


@pytest.mark.parametrize(
    ("kind", "group", "symmetric", "shuffled", "quality", "kept"),
    [
        ("gptq", 128, True, False, "fast", True),
        ("gptq", 128, True, False, "balanced", True),
        ("gptq", 128, True, False, "best", True),
        ("gptq", 64, True, False, "fast", True),
        ("compressed", -1, True, False, "fast", True),
        ("auto-awq", 128, True, False, "fast", True),
        ("gptq", 32, True, False, "fast", False),
        ("gptq", 64, True, True, "fast", False),  # activation order: neighbouring columns have different scales
        ("awq", 128, False, False, "fast", False),
    ],
)
def test_packed_checkpoints_keep_their_codes(
    kind: str, group: int, symmetric: bool, shuffled: bool, quality: str, kept: bool,
    own_checkpoint: Any, words: str, tmp_path: Path,
) -> None:  # fmt: skip
    folder = own_checkpoint("opt")
    wanted = pack(folder, kind, Packer(4, group, symmetric, shuffled))
    report = quantize(folder, tmp_path / "out.gguf", calibration=[words], options=options(quality=quality))
    said = [warning for warning in report.warnings if "keep them as their codes" in warning]
    assert bool(said) == kept
    with open_gguf(tmp_path / "out.gguf") as reader:
        for layer in range(2):
            name = f"blk.{layer}.attn_output.weight"
            exact = wanted[f"model.decoder.layers.{layer}.self_attn.out_proj.weight"]
            made = blocks.unpack(np.frombuffer(reader.raw(name), np.uint8).reshape(exact.shape[0], -1))
            wrong = np.square(reference.dequantize(made) - exact).sum() / np.square(exact).sum()
            assert (wrong < 3e-5) == kept and made.parameters.rotated == (not kept)


def test_a_mixture_of_kept_and_other_matrices(own_checkpoint: Any, words: str, tmp_path: Path) -> None:
    """Factors must not move from a norm into a matrix whose integers are kept."""
    folder = own_checkpoint("llama")
    pack(folder, "gptq", Packer(4, 128, True, False))
    source = tmp_path / "float.gguf"
    import_checkpoint(folder, source)
    with open_gguf(source) as reader:
        at = reader.tensors["blk.0.attn_k.weight"]
        changed = reader.read(at.name) * np.random.default_rng(0).uniform(0.9, 1.1, at.shape).astype(np.float32)
        raw = bytearray(source.read_bytes())
        raw[at.offset : at.offset + at.n_bytes] = changed.astype(np.float16).tobytes()
    source.write_bytes(raw)
    plans = {plan.source.name: plan for plan in plan_file(source, options())}
    assert plans["blk.0.attn_q.weight"].own_codes and not plans["blk.0.attn_k.weight"].own_codes
    for quality in ("balanced", "best"):
        report = quantize(source, tmp_path / "out.gguf", calibration=[words], options=options(quality=quality))
        assert any("keep them as their codes" in warning and "quantized anew" in warning for warning in report.warnings)
        errors = {tensor.name: tensor.error for tensor in report.tensors}
        assert (errors["blk.0.attn_q.weight"] or 1) < 3e-5 < (errors["blk.0.attn_k.weight"] or 0)
        if quality == "best":
            continue  # it trains the norms last
        with open_gguf(source) as before, open_gguf(tmp_path / "out.gguf") as after:
            np.testing.assert_array_equal(before.raw("blk.0.attn_norm.weight"), after.raw("blk.0.attn_norm.weight"))
