"""ggml's types of 5 and 6 bits: their grids, and error feedback into them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats
from agq_gguf.errors import InputError
from agq_gguf.format import stock_grids
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.matrix import equalize, row_feedback, stock_feedback, stock_types
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.simulate import BlockRounder
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.quantization.budget import knapsack
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import plan_file, quantize
from agq_gguf.quantization.resume import Journal

ROWS, COLUMNS = 48, 512
TYPES = pytest.mark.parametrize("type_name", stock_grids.TYPE_NAMES)
OPTIONS = MatrixOptions()


def correlated(seed: int = 0) -> InputStats:
    """Statistics of an input with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((COLUMNS, COLUMNS)) / np.sqrt(1 + np.arange(COLUMNS))[:, None]
    x = rng.standard_normal((4096, COLUMNS)) @ mix * np.exp(0.7 * rng.standard_normal(COLUMNS))
    hessian = (x.T @ x / len(x)).astype(np.float32)
    return InputStats(len(x), hessian.diagonal().copy(), hessian=hessian)


def weights(seed: int = 1, rows: int = ROWS) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, COLUMNS)).astype(np.float32)


def loss(error: NDArray[np.float32], hessian: NDArray[np.float32] | None) -> float:
    assert hessian is not None
    wide = error.astype(np.float64)
    return float((wide @ hessian * wide).sum())


# grids


@TYPES
@pytest.mark.parametrize("size", [1e-7, 1.0, 3e4])
def test_a_grid_is_what_the_type_means(type_name: str, size: float) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((9, COLUMNS)) * size + size / 4).astype(np.float32)
    rows[3] = 0
    data = stock_types.quantize(rows, type_name)
    grid = stock_grids.grid(data, type_name)
    codes = rng.integers(0, grid.most + 1, rows.shape).astype(np.uint8)
    made = stock_grids.with_codes(data, type_name, codes)
    wanted = grid.step.repeat(grid.width, 1) * codes + grid.offset.repeat(grid.width, 1)
    np.testing.assert_allclose(stock_types.restored(made, type_name), wanted, rtol=1e-5, atol=1e-6 * size)
    assert np.array_equal(stock_grids.grid(made, type_name).step, grid.step)
    assert (data != made).any() and grid.step[3].any() == grid.offset[3].any() == False  # noqa: E712


# feedback


def by_definition(
    weight: NDArray[np.float32], data: NDArray[np.uint8], type_name: str, hessian: NDArray[np.float64], order: list[int]
) -> NDArray[np.float64]:
    """The weights of every row, each at the time when it is rounded on the grid of `data`.

    Column by column: the error of one is fixed, and all later ones are set to what then loses least.
    """
    restored = stock_types.restored(data, type_name).astype(np.float64)
    now = weight.astype(np.float64)
    for i, column in enumerate(order[:-1]):
        later = order[i + 1 :]
        error = now[:, column] - restored[:, column]
        now[:, later] += np.outer(error, np.linalg.solve(hessian[np.ix_(later, later)], hessian[later, column]))
    return now


@pytest.mark.parametrize("type_name", ["q5_1", "q6_K"])
def test_columns_are_rounded_as_the_definition_says(type_name: str) -> None:
    stats, w = correlated(), weights(rows=4)
    prepared = stock_feedback.prepare(stats, type_name, MatrixOptions(sweeps=0))
    assert prepared.known is not None and stats.hessian is not None
    found = stock_feedback.quantize(w, prepared)
    hessian = stats.hessian.astype(np.float64)
    hessian += OPTIONS.damping * hessian.diagonal().mean() * np.eye(COLUMNS)
    asked = by_definition(w, found.packed, type_name, hessian, prepared.known.order.tolist())
    grid = stock_grids.grid(found.packed, type_name)
    step, offset = (part.repeat(grid.width, 1) for part in (grid.step, grid.offset))
    wanted = np.clip(np.rint((asked - offset) / step), 0, grid.most) * step + offset
    assert (np.abs(wanted - found.restored()) < 1e-3 * np.abs(step)).mean() > 0.995  # the others lie at a midpoint


@TYPES
def test_feedback_loses_less(type_name: str) -> None:
    stats, w = correlated(), weights()
    found = stock_feedback.quantize(w, stock_feedback.prepare(stats, type_name, OPTIONS))
    plain = stock_types.rounded(w, type_name, stats.mean_square)
    assert loss(w - found.restored(), stats.hessian) < 0.5 * loss(w - plain, stats.hessian)
    assert found.error == pytest.approx(loss(w - found.restored(), stats.hessian) / loss(w, stats.hessian), rel=0.05)


@TYPES
def test_descent_never_loses(type_name: str) -> None:
    stats, w = correlated(), weights()
    lost = []
    for sweeps in (0, 1, 4):
        prepared = stock_feedback.prepare(stats, type_name, MatrixOptions(sweeps=sweeps))
        lost.append(loss(w - stock_feedback.quantize(w, prepared).restored(), stats.hessian))
    assert lost[2] < lost[1] < 0.99 * lost[0]


@TYPES
def test_without_a_hessian_it_is_the_stock_type(type_name: str) -> None:
    w, stats = weights(), correlated()
    squares = InputStats(stats.tokens, stats.mean_square)
    plain = stock_types.quantize(w, type_name, stats.mean_square)
    for given in (squares, stats):
        options = MatrixOptions(error_feedback=given is squares)
        found = stock_feedback.quantize(w, stock_feedback.prepare(given, type_name, options))
        assert np.array_equal(found.packed, plain) and 0 < found.error < 0.01
    silent = InputStats(9, np.zeros(COLUMNS, np.float32), hessian=np.zeros((COLUMNS, COLUMNS), np.float32))
    for nothing in (None, silent):
        found = stock_feedback.quantize(w, stock_feedback.prepare(nothing, type_name, OPTIONS))
        assert np.array_equal(found.packed, stock_types.quantize(w, type_name))


def test_odd_matrices() -> None:
    stats = correlated()
    for type_name in stock_grids.TYPE_NAMES:
        prepared = stock_feedback.prepare(stats, type_name, OPTIONS)
        w = weights(rows=3)
        w[0], w[1, 32:] = 0, 0
        found = stock_feedback.quantize(w, prepared).restored()
        assert not found[0].any() and np.isfinite(found).all()
        assert stock_feedback.quantize(w[:1], prepared).error == 0
        w[2, 7] = np.nan
        with pytest.raises(InputError, match="tensor blk holds a NaN"):
            stock_feedback.quantize(w, prepared, "blk")


@pytest.mark.parametrize("type_name", ["q5_1", "q6_K"])
def test_values_beyond_f16_are_refused(type_name: str) -> None:
    w = weights(rows=2)
    w[1, :256] = -1e6
    w[1, 3] = 1e9
    with pytest.raises(InputError, match=rf"tensor blk has values that the type {type_name} cannot hold; leave"):
        stock_feedback.quantize(w, stock_feedback.prepare(correlated(), type_name, OPTIONS), "blk")


def test_rows_make_up_for_each_other() -> None:
    stats, w = correlated(), weights()
    assert stats.hessian is not None
    g = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        6, ROWS, generator=torch.Generator().manual_seed(1)
    )
    gram = g.T @ g / 400 + 0.01 * torch.eye(ROWS)
    prepared = stock_feedback.prepare(stats, "q5_1", OPTIONS)

    def cost(made: stock_feedback.QuantizedStock) -> float:
        error = torch.from_numpy(w - made.restored())
        return float(((row_feedback.damped(gram) @ error) * (error @ torch.from_numpy(stats.hessian))).sum())

    alone = stock_feedback.quantize(w, prepared)
    assert cost(stock_feedback.quantize(w, prepared, gram=gram)) < 0.7 * cost(alone)
    nothing = stock_feedback.quantize(w, prepared, gram=torch.zeros(ROWS, ROWS))
    assert np.array_equal(nothing.packed, alone.packed)


@pytest.mark.parametrize("type_name", ["q5_0", "q6_K"])
def test_equalization_sees_the_blocks_of_the_kernels(type_name: str) -> None:
    """An outlier that rotation spreads among 64 channels sets the scale of a whole block here."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, COLUMNS)).astype(np.float32)
    w = (weights() / 8).astype(np.float32)
    x[:, 7] *= 40
    w[:, 7] /= 40
    stats = InputStats(len(x), np.square(x).mean(0), np.abs(x).max(0), x)
    found = equalize.choose(stats, [(type_name, w)], 0, 8, "rotated", True)
    assert found is not None and found[7] > 5 * np.median(found)

    def error(s: NDArray[np.float32]) -> float:
        rounder = BlockRounder(stock_types.input_block(type_name))
        exact, made = torch.from_numpy(x / s), torch.from_numpy(w * s)
        return float(((rounder(exact) - exact) @ made.T).square().mean())

    assert error(found) < 0.2 * error(np.ones(COLUMNS, np.float32))


def test_a_journal_keeps_them(tmp_path: Path) -> None:
    made = stock_feedback.quantize(weights(), stock_feedback.prepare(correlated(), "q5_0", OPTIONS))
    journal = Journal(tmp_path / "journal", "key")
    journal.put_matrix("a", made)
    found = journal.get_matrix("a")
    assert isinstance(found, stock_feedback.QuantizedStock) and np.array_equal(found.packed, made.packed)
    assert (found.type_name, found.error, found.note) == (made.type_name, made.error, made.note)


# the whole


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_a_budget_uses_feedback(quality: str, experts: int, words: str, tmp_path: Path) -> None:
    """Files of the same types, with error feedback and without."""
    source = tiny_models.write_llama(tmp_path / "m.gguf", n_expert=experts, n_expert_used=2 if experts else 0)
    sizes = QuantizeOptions(output_type="agq4", embedding_type="agq4")
    target = knapsack.bits_per_weight(plan_file(source, sizes)) + 1.2

    def run(name: str, matrix: MatrixOptions) -> tuple[set[str], float]:
        out = tmp_path / name
        options = QuantizeOptions(
            quality=quality, target_bpw=target, threads=1, context=64, calibration_tokens=2048, matrix=matrix
        )
        report = quantize(source, out, calibration=[words], options=options)
        assert report.bits_per_weight <= target
        assert all((t.error is None) == (t.type_name in ("f16", "f32", "q8_0")) for t in report.tensors)
        with open_gguf(out) as reader:
            kinds = {t.type_name for t in reader.tensors.values()}
        return kinds, evaluate(out, source, words, context=64, chunks=8, threads=1).mean_kl

    kinds, kl = run("with.gguf", MatrixOptions())
    assert kinds & set(stock_grids.TYPE_NAMES)
    most = 1.2 if experts and quality == "best" else 0.9  # experts of a random model do not say how to help each other
    assert kl < most * run("without.gguf", MatrixOptions(error_feedback=False))[1]


def test_best_with_nothing_to_tune(words: str, tmp_path: Path) -> None:
    """OLMo's norms have no weights, and types of 5 bits no scales that are trained."""
    model = tiny_models.TinyModel(tmp_path / "olmo.gguf", "olmo", "f16", 0)
    tiny_models.add_sizes(model, 1, 128, 256, 4, 4, 512)
    model.writer.add_vocab_size(512)
    model.writer.add_rope_dimension_count(32)
    model.writer.add_layer_norm_eps(1e-5)
    quiet = tiny_models.add_bpe_tokenizer(model.writer, 512, pre="olmo")
    model.embedding("token_embd", 512, 128)
    for name, rows, columns in (
        ("attn_q", 128, 128), ("attn_k", 128, 128), ("attn_v", 128, 128), ("attn_output", 128, 128),
        ("ffn_gate", 256, 128), ("ffn_up", 256, 128), ("ffn_down", 128, 256),
    ):  # fmt: skip
        model.matrix(f"blk.0.{name}", rows, columns, gain=0.5)
    model.output("output", 512, 128, quiet=quiet)
    options = QuantizeOptions(
        quality="best", target_bpw=6.0, target_types=("q5_1",), threads=1, context=64, calibration_tokens=512
    )
    report = quantize(model.finish(), tmp_path / "out.gguf", calibration=[words], options=options)
    assert {t.type_name for t in report.tensors} == {"q5_1"}
    assert any("were not tuned" in warning for warning in report.warnings)
    assert not any("supports no tensor" in warning for warning in report.warnings)
