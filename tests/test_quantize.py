from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agq_gguf.calibration.stats import InputStats
from agq_gguf.errors import InputError
from agq_gguf.format import blocks, reference
from agq_gguf.matrix import codebook, column_feedback, row_feedback, two_refine
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import prepare_input, quantize_matrix

ROWS, COLUMNS, TOKENS = 64, 256, 4096
PLAIN = MatrixOptions(activation_scale="token", refine=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def correlated_input(seed: int = 0, outliers: tuple[int, ...] = ()) -> np.ndarray:
    """Activations [TOKENS, COLUMNS] with a decaying spectrum, as those of models have."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((COLUMNS, COLUMNS)) / np.sqrt(1 + np.arange(COLUMNS))[:, None]
    x = rng.standard_normal((TOKENS, COLUMNS)) @ mix + 0.1 * rng.standard_normal((TOKENS, COLUMNS))
    x *= np.exp(0.7 * rng.standard_normal(COLUMNS))
    x[:, list(outliers)] *= 40
    return x.astype(np.float32)


def stats_of(x: np.ndarray, hessian: bool = True) -> InputStats:
    h = (x.T @ x / len(x)).astype(np.float32) if hessian else None
    return InputStats(len(x), (x * x).mean(axis=0), np.abs(x).max(axis=0), x[::16], h)


def weights(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)


def output_error(w: np.ndarray, x: np.ndarray, stats: InputStats | None, options: MatrixOptions = PLAIN) -> float:
    """Squared output error over squared output on x, measured on what the format really says."""
    result = quantize_matrix(w, prepare_input(stats, COLUMNS, 1000, options), options)
    restored = reference.dequantize(blocks.unpack(blocks.pack(result.matrix)))
    error = float(np.square(x @ (restored - w).T, dtype=np.float64).sum() / np.square(x @ w.T, dtype=np.float64).sum())
    if stats is not None and stats.hessian is not None:
        assert result.error == pytest.approx(error, rel=0.02)
    return error


def test_each_step_is_better_than_the_one_before() -> None:
    w, x = weights(), correlated_input()
    plain = output_error(w, x, None)
    searched = output_error(w, x, stats_of(x, hessian=False))
    fed_back = output_error(w, x, stats_of(x), replace(PLAIN, sweeps=0))
    descended = output_error(w, x, stats_of(x))
    assert plain < 0.0085
    assert searched < 0.98 * plain
    assert fed_back < 0.6 * searched
    assert descended < 0.95 * fed_back


def test_better_than_rounding_to_q4_0() -> None:
    """Against the stock type of about the same size, on plain weights."""
    import gguf

    w = np.random.default_rng(3).standard_normal((256, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    stock = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)
    ours = reference.dequantize(quantize_matrix(w, prepare_input(None, 512, 0, PLAIN), PLAIN).matrix)
    assert np.square(ours - w).sum() < 0.9 * np.square(stock - w).sum()


def test_learned_codebook_is_better_on_odd_weights() -> None:
    w = weights() ** 3
    x = correlated_input()
    fixed = output_error(w, x, None, replace(PLAIN, learn_codebook=False))
    assert output_error(w, x, None) < 0.8 * fixed


def test_representable_weights_are_exact() -> None:
    rng = np.random.default_rng(5)
    values = np.array(codebook._FIXED)[rng.integers(0, 16, (ROWS, COLUMNS))]
    values[:, ::64] = -64  # so that the largest weight of each group is on the far end
    scales = 2.0 ** rng.integers(-3, 1, (ROWS, COLUMNS // 64))
    w = (values * scales.repeat(64, axis=1)).astype(np.float32)
    for stats in (None, stats_of(correlated_input())):
        for learn in (False, True):
            options = replace(PLAIN, learn_codebook=learn)
            result = quantize_matrix(w, prepare_input(stats, COLUMNS, 0, options), options)
            np.testing.assert_array_equal(reference.dequantize(result.matrix), w)
            assert result.error == 0


@pytest.mark.parametrize("hessian", [False, True])
def test_odd_matrices(hessian: bool) -> None:
    x = correlated_input()
    x[:, :70] = 0  # channels that never speak
    stats = stats_of(x, hessian)
    prepared = prepare_input(stats, COLUMNS, 0, PLAIN)
    w = weights()
    w[3] = 0
    w[5] = 0.25
    w[7, 64:128] = 0
    w[9] *= 1e-3
    w[11] *= 1e3
    result = quantize_matrix(w, prepared, PLAIN)
    restored = reference.dequantize(blocks.unpack(blocks.pack(result.matrix)))
    assert np.isfinite(restored).all() and np.isfinite(result.error)
    np.testing.assert_array_equal(restored[3], 0)
    np.testing.assert_array_equal(restored[7, 64:128], 0) if not hessian else None
    if not hessian:
        np.testing.assert_allclose(restored[5], 0.25, rtol=0.02)
        for row in (9, 11):  # far smaller and far larger than the others
            assert np.square(restored[row] - w[row]).sum() < 0.02 * np.square(w[row]).sum()
    assert np.abs(restored[0] - w[0]).max() < 1  # silent channels are stored sensibly too
    zero = quantize_matrix(np.zeros((ROWS, COLUMNS), np.float32), prepared, PLAIN)
    assert zero.error == 0 and not reference.dequantize(zero.matrix).any()
    blocks.pack(zero.matrix)


@pytest.mark.parametrize("scale", [1e-33, 1e30])
def test_extreme_sizes(scale: float) -> None:
    w = weights() * np.float32(scale)
    result = quantize_matrix(w, prepare_input(None, COLUMNS, 0, PLAIN), PLAIN)
    restored = reference.dequantize(blocks.unpack(blocks.pack(result.matrix)))
    error = np.square((restored - w) / scale, dtype=np.float64).mean()
    assert error < 0.01


def test_bad_weights_are_named() -> None:
    w = weights()
    for bad in (np.nan, np.inf, -np.inf):
        w[2, 3] = bad
        with pytest.raises(InputError, match=r"tensor blk\.0\.x holds a NaN"):
            quantize_matrix(w, prepare_input(None, COLUMNS, 0, PLAIN), PLAIN, "blk.0.x")


def test_useless_hessian_is_told() -> None:
    stats = replace(stats_of(correlated_input()), hessian=-np.eye(COLUMNS, dtype=np.float32))
    prepared = prepare_input(stats, COLUMNS, 0, PLAIN)
    result = quantize_matrix(weights(), prepared, PLAIN)
    assert "error feedback failed" in result.note and result.error < 0.01
    silent = InputStats(10, np.zeros(COLUMNS, np.float32))
    assert "always zero" in quantize_matrix(weights(), prepare_input(silent, COLUMNS, 0, PLAIN), PLAIN).note


def test_inverse_factor() -> None:
    h = torch.from_numpy(stats_of(correlated_input()).hessian)
    known = column_feedback.correlations(h.clone(), 0.01)
    assert known is not None
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(COLUMNS)
    torch.testing.assert_close(known.hessian, damped)
    assert torch.equal(known.upper, known.upper.triu())
    ordered = damped[known.order][:, known.order].double()
    product = known.upper.double().T @ known.upper.double() @ ordered
    torch.testing.assert_close(product, torch.eye(COLUMNS, dtype=torch.float64), atol=1e-3, rtol=0)
    groups = known.order.reshape(-1, 64) // 64
    assert torch.equal(groups, groups[:, :1].expand(-1, 64)) and len(groups[:, 0].unique()) == COLUMNS // 64


def test_descent_never_loses() -> None:
    h = torch.from_numpy(stats_of(correlated_input()).hessian)
    known = column_feedback.correlations(h.clone(), 0.01)
    assert known is not None
    w = torch.from_numpy(weights() * 20)
    book = codebook.fixed()

    def loss(sweeps: int) -> float:
        codes, scales = column_feedback.quantize(w, known, book, sweeps)
        error = w - book.values[codes.int()] * scales.repeat_interleave(64, 1)
        return float(((error @ known.hessian) * error).sum())

    losses = [loss(n) for n in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[3] < 0.97 * losses[0]


def gram_of(rows: int, rank: int) -> torch.Tensor:
    """G of outputs that are mixed behind: of low rank, but for some noise."""
    rng = torch.Generator().manual_seed(3)
    g = torch.randn(400, rank, generator=rng) @ torch.randn(rank, rows, generator=rng)
    return g.T @ g / 400 + 0.01 * torch.eye(rows)


def test_rows_make_up_for_each_other() -> None:
    h = torch.from_numpy(stats_of(correlated_input()).hessian)
    known = column_feedback.correlations(h.clone(), 0.01)
    assert known is not None
    w, book, gram = torch.from_numpy(weights() * 20), codebook.fixed(), gram_of(ROWS, 6)

    def error(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return w - book.values[codes.int()] * scales.repeat_interleave(64, 1)

    def loss(e: torch.Tensor) -> float:
        return float(((row_feedback.damped(gram) @ e) * (e @ known.hessian)).sum())

    alone = error(*column_feedback.quantize(w, known, book, 3))
    together = error(*row_feedback.quantize(w, known, gram, book, 3))
    assert loss(together) < 0.6 * loss(alone)
    assert float((together @ known.hessian * together).sum()) > float((alone @ known.hessian * alone).sum())
    nothing = row_feedback.quantize(w, known, torch.zeros(ROWS, ROWS), book, 3)
    for found, expected in zip(nothing, column_feedback.quantize(w, known, book, 3), strict=True):
        assert torch.equal(found, expected)
    diagonal = row_feedback.quantize(w, known, torch.diag(torch.arange(1.0, ROWS + 1)), book, 3)
    assert loss(error(*diagonal)) == pytest.approx(loss(alone), rel=1e-3)


def test_what_later_rows_make_up_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the errors of the first rows fixed, the others are asked for what minimizes tr(G E H E^T)."""
    h = torch.from_numpy(stats_of(correlated_input()).hessian)
    known = column_feedback.correlations(h.clone(), 0.01)
    assert known is not None
    w, gram = torch.from_numpy(weights() * 20), gram_of(ROWS, 6)
    asked: list[torch.Tensor] = []
    real = column_feedback.quantize

    def listen(rows: torch.Tensor, *rest: Any) -> Any:
        asked.append(rows.clone())
        return real(rows, *rest)

    monkeypatch.setattr(column_feedback, "quantize", listen)
    book = codebook.fixed()
    codes, scales = row_feedback.quantize(w, known, gram, book, 1)
    order = gram.diagonal().argsort(descending=True, stable=True)
    error = (w - book.values[codes.int()] * scales.repeat_interleave(64, 1))[order].double()
    g = row_feedback.damped(gram)[order][:, order].double()
    n = len(asked[0])
    assert len(asked) == ROWS // n and torch.equal(asked[0], w[order[:n]])
    best = w[order[n:]].double() + torch.linalg.solve(g[n:, n:], g[n:, :n] @ error[:n])
    torch.testing.assert_close(asked[1].double(), best[:n], rtol=1e-3, atol=1e-3 * float(w.abs().max()))


def test_nearest_codes_are_nearest() -> None:
    book = codebook.fixed()
    v = torch.linspace(-80, 80, 3001)
    exact = (v[:, None] - book.values).abs().argmin(1)
    distance = (book.values[book.encode(v)] - v).abs() - (book.values[exact] - v).abs()
    assert distance.max() < 1e-4 and torch.equal(book.nearest(v), book.values[book.encode(v)])


def test_groups_that_are_not_correlated() -> None:
    """One matrix for each group, or one for all with zeros between them: the same."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(COLUMNS // 64, 64, 80, generator=generator) * torch.rand(COLUMNS // 64, 64, 1, generator=generator)
    each = x @ x.mT / 80
    whole = torch.block_diag(*each)
    noise = torch.rand(COLUMNS, generator=generator) / 100
    apart, together = (column_feedback.correlations(h.clone(), 0.01, noise) for h in (each, whole))
    assert apart is not None and together is not None and together.coupled and not apart.coupled
    torch.testing.assert_close(apart.importance, together.importance, rtol=1e-3, atol=0)
    w = torch.from_numpy(weights())
    torch.testing.assert_close(column_feedback.times(each, w.T), whole @ w.T, rtol=1e-4, atol=1e-4)
    book = codebook.fixed()
    (codes, scales), (wanted, wanted_scales) = (
        column_feedback.quantize(w, known, book, 2) for known in (apart, together)
    )
    assert (codes == wanted).float().mean() > 0.995 and (scales == wanted_scales).float().mean() > 0.98


# refinement


def noise(x: np.ndarray, found: two_refine.Refinement) -> float:
    """What int8 really does to x, as a share of its energy."""
    parameters = blocks.Parameters(np.arange(16, dtype=np.uint8), found.exponents, found.listed)
    xq, s = reference.quantize_activations(x, parameters)
    growth = np.exp2(found.exponents.astype(np.float32)).repeat(64)
    restored = np.empty_like(x)
    restored[:, blocks.channel_order(found.listed, x.shape[1])] = xq * s * growth
    return float(np.square(restored - x, dtype=np.float64).sum() / np.square(x, dtype=np.float64).sum())


def test_outliers_are_gathered_and_shrunk() -> None:
    outliers = (7, 77, 133, 200)
    x = correlated_input(outliers=outliers)
    sample = x[::16]
    plain = two_refine.none(COLUMNS)
    exponents = two_refine.choose(sample, 0, 8, "token")
    listed = two_refine.choose(sample, COLUMNS // 2, 8, "token")
    assert set(outliers) <= set(listed.listed.tolist()) and len(listed.listed) == 64
    assert listed.exponents[0] >= 3 and not listed.exponents[1:].any()
    assert not exponents.listed.size and noise(x, exponents) <= noise(x, plain)
    assert noise(x, listed) < 0.3 * noise(x, plain)
    full = two_refine.choose(sample, 1000, 8, "token")
    energy = np.square(x.astype(np.float64)).mean(axis=0)[full.listed]
    assert len(full.listed) == COLUMNS and set(outliers) <= set(full.listed[:8].tolist())
    assert np.corrcoef(np.log(energy), -np.arange(COLUMNS))[0, 1] > 0.5  # sorted, as far as the sample tells
    assert noise(x, full) < 0.3 * noise(x, plain)
    assert two_refine.choose(sample, 63, 8, "token").listed.size == 0
    assert not two_refine.choose(sample, 1000, 8, "group").exponents.any()
    assert not two_refine.choose(sample, 1000, 8, "token", enabled=False).exponents.any()


def test_nothing_is_refined_without_need() -> None:
    x = np.random.default_rng(0).standard_normal((256, COLUMNS)).astype(np.float32)
    found = two_refine.choose(x, 1000, 8, "token")
    assert not found.listed.size and not found.exponents.any()
    peak = np.abs(x).max(axis=1)
    np.testing.assert_allclose(found.noise, np.full(COLUMNS // 64, np.mean(peak**2) / 12 / 127**2), rtol=1e-3)
    for odd in (np.zeros((0, COLUMNS), np.float32), np.zeros((9, COLUMNS), np.float32)):
        assert two_refine.choose(odd, 1000, 8, "token").noise.max() == 0


def test_order_for_scales_per_group() -> None:
    """Each group has its own maximum then: an order that puts large channels together makes most of them smaller."""
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(200, 2048)) * np.where(np.arange(2048) % 64 == 5, 40, 1)).astype(np.float32)
    found = two_refine.choose(x, 100, 8, "group")
    assert set(found.listed[:32]) == set(range(5, 2048, 64)) and not found.exponents.any()
    plain = (np.abs(x).reshape(200, 32, 64).max(axis=2) ** 2).mean() / (12 * 127**2)
    assert found.noise.mean() < 0.3 * plain


def test_rotation_leaves_nothing_to_refine() -> None:
    x = correlated_input(outliers=(7, 77, 133))
    found = two_refine.choose(x, 1000, 8, "rotated")
    assert not found.listed.size and not found.exponents.any()
    peaks = np.abs(reference.rotate(x)).reshape(len(x), -1, 64).max(axis=2)
    np.testing.assert_allclose(found.noise, (peaks**2).mean(axis=0) / 12 / 127**2, rtol=1e-3)


def test_what_is_prepared_for_rotated_groups() -> None:
    x = correlated_input(outliers=(7, 77, 133))
    stats = stats_of(x)
    turned = reference.rotate(x)
    square = np.square(turned).mean(axis=0)
    known = prepare_input(stats, COLUMNS, 1000, MatrixOptions())
    expected = turned.T @ turned / len(x) / np.square(x).mean()
    assert known.correlations is not None
    added = known.correlations.added
    undamped = known.correlations.hessian - added.diag()
    np.testing.assert_allclose(undamped, expected, atol=1e-3 * expected.max())
    noise = known.refinement.noise.repeat(64) / square.mean()
    np.testing.assert_allclose(added, 0.01 + noise, rtol=0.02, atol=1e-5)
    searched = prepare_input(replace(stats, hessian=None), COLUMNS, 1000, MatrixOptions())
    means = np.square(x).mean(axis=0)
    assert searched.correlations is not None
    undamped = searched.correlations.hessian - searched.correlations.added.reshape(-1, 64).diag_embed()
    assert undamped.shape == (COLUMNS // 64, 64, 64)
    here = slice(64, 128)  # channels 77 and 7 are outliers of different groups
    expected = reference.rotate(reference.rotate(np.diag(means[here] / means.mean())).T)
    np.testing.assert_allclose(undamped[1], expected, atol=1e-3 * expected.max())


def test_what_is_prepared_is_about_the_refined_input() -> None:
    options = MatrixOptions(activation_scale="token")
    x = correlated_input(outliers=(7, 77, 133))
    stats = stats_of(x)
    searched = prepare_input(replace(stats, hessian=None), COLUMNS, 1000, options)
    found = searched.refinement
    assert found.listed.size and found.exponents[0]
    shrink = np.exp2(-found.exponents.astype(np.float32)).repeat(64)
    refined = x[:, blocks.channel_order(found.listed, COLUMNS)] * shrink
    square = np.square(refined).mean(axis=0)
    np.testing.assert_allclose(searched.importance, square / square.mean(), rtol=1e-3)
    known = prepare_input(stats, COLUMNS, 1000, options)
    expected = refined.T @ refined / len(x) / square.mean()
    assert known.correlations is not None
    added = known.correlations.added
    undamped = known.correlations.hessian - added.diag()
    np.testing.assert_allclose(undamped, expected, atol=1e-3 * expected.max())
    np.testing.assert_allclose(added, 0.01 + found.noise.repeat(64) / square.mean(), rtol=0.02, atol=1e-5)
    assert found.noise.min() / square.mean() > 1e-4


def test_refined_product_is_closer() -> None:
    """With everything in place: int8 activations times 4-bit weights."""
    x, w = correlated_input(outliers=(7, 77, 133)), weights()
    exact = x @ w.T

    def error(options: MatrixOptions) -> float:
        matrix = quantize_matrix(w, prepare_input(stats_of(x), COLUMNS, 1000, options), options).matrix
        return float(np.square(reference.matmul_reference(x[:512], matrix) - exact[:512]).sum())

    refined = error(MatrixOptions(activation_scale="token"))
    assert refined < 0.7 * error(PLAIN)
    assert error(MatrixOptions()) < 0.9 * refined
