"""The compiled inner loops of rounding against tests/reference_rounding.py, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import reference_rounding as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agq_gguf.format.blocks import round_scale
from agq_gguf.matrix import codebook, kernels

seeds = st.integers(0, 2**32 - 1)
rows = st.integers(1, 70)
sizes = st.sampled_from([1e-30, 1e-3, 1.0, 300.0, 1e12])


def some_codebook(rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(3)
    if kind == 0:
        return codebook.fixed().values.numpy()
    values = rng.integers(-64, 64, 16) if kind == 1 else rng.normal(size=16) * 40
    return np.sort(values).astype(np.float32)


def some_weights(rng: np.random.Generator, n: int, size: float) -> np.ndarray:
    weights = (rng.standard_t(4, (64, n)) * size).astype(np.float32)
    weights[:, rng.random(n) < 0.1] = 0
    return weights


def some_hessian(rng: np.random.Generator) -> np.ndarray:
    x = (rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64)) * np.exp(rng.normal(size=64))).astype(np.float32)
    return x.T @ x / np.float32(200)


def same(found: torch.Tensor, wanted: np.ndarray) -> bool:
    """Equal bits, but for the sign of zeros."""
    return np.array_equal(found.numpy(), wanted, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(seeds, rows, sizes, st.booleans())
def test_search(seed: int, n: int, size: float, each: bool) -> None:
    rng = np.random.default_rng(seed)
    values, weights = some_codebook(rng), some_weights(rng, n, size)
    h = np.exp(rng.normal(size=(64, n) if each else 64)).astype(np.float32)
    found = kernels.search_scales(*map(torch.from_numpy, (values, weights, h)))
    assert same(found, reference.search_scales(values, weights, h))


@settings(max_examples=25, deadline=None)
@given(seeds, rows, sizes)
def test_feed_back(seed: int, n: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    values, weights = some_codebook(rng), some_weights(rng, n, size)
    upper = np.linalg.cholesky(np.linalg.inv(some_hessian(rng).astype(np.float64) + 0.1 * np.eye(64))).T
    upper = np.ascontiguousarray(upper, np.float32)
    kept = weights.copy()
    found = kernels.feed_back(*map(torch.from_numpy, (values, upper, weights)))
    assert np.array_equal(weights, kept)
    codes, scales, errors = reference.feed_back(values, upper, weights)
    assert same(found[0], codes) and same(found[1], scales) and same(found[2], errors)


@settings(max_examples=25, deadline=None)
@given(seeds, rows, st.sampled_from([1e-3, 1.0, 300.0]))
def test_descend(seed: int, n: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    values, weights, inside = some_codebook(rng), some_weights(rng, n, size), some_hessian(rng)
    scales = round_scale((rng.normal(size=n) * size / 20).astype(np.float32))
    codes = reference.nearest(values, weights * reference.inverse(scales))
    slope = inside @ (weights - values[codes] * scales)
    wanted = reference.descend(values, inside, slope, codes, scales)
    before = np.einsum("jn,jn->n", weights - values[codes] * scales, slope, dtype=np.float64)
    new_codes, new_scales = torch.from_numpy(codes.copy()), torch.from_numpy(scales.copy())
    known = [torch.from_numpy(known) for known in (values, inside, slope)]
    change = kernels.descend(known[0], known[1], known[2], new_codes, new_scales)
    assert same(new_codes, wanted[0]) and same(new_scales, wanted[1]) and same(change, wanted[2])
    error = weights.astype(np.float64) - values[new_codes.numpy()].astype(np.float64) * new_scales.numpy()
    after = (error * (inside.astype(np.float64) @ error)).sum(0)
    assert (after <= before * (1 + 1e-4) + 1e-12 * size**2).all()


@settings(max_examples=25, deadline=None)
@given(seeds, rows, st.integers(0, 20), sizes, st.integers(0, 3))
def test_subtract_product(seed: int, n: int, fours: int, size: float, more: int) -> None:
    """Also for rows that are parts of longer ones."""
    rng = np.random.default_rng(seed)
    whole = rng.normal(size=(4 * fours, 64 + 8 * more)).astype(np.float32)
    right, out = some_weights(rng, n, size)[: 4 * fours], some_weights(rng, n, size)
    right = np.resize(right, (4 * fours, n))
    left = whole[:, 8 * more :]
    wanted = reference.subtract_product(left, right, out)
    found = torch.from_numpy(out)
    kernels.subtract_product(torch.from_numpy(whole)[:, 8 * more :], torch.from_numpy(right), found)
    assert same(found, wanted)


@settings(max_examples=25, deadline=None)
@given(seeds, rows, st.sampled_from([1, 32, 50, 256]), sizes, st.sampled_from([31, 63, 255]))
def test_on_a_grid(seed: int, n: int, columns: int, size: float, most: int) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_t(4, (columns, n)) * size).astype(np.float32)
    steps = (rng.normal(size=(columns, n)) * 4 * size / most).astype(np.float32)
    steps[rng.random((columns, n)) < 0.05] = 0
    offsets = (-steps * most / 2 + rng.normal(size=(columns, n)) * size).astype(np.float32)
    x = (rng.normal(size=(3 * columns, columns)) * np.exp(rng.normal(size=columns))).astype(np.float32)
    inside = x.T @ x / np.float32(len(x))
    upper = np.linalg.cholesky(np.linalg.inv(inside.astype(np.float64))).T.astype(np.float32).copy()
    grid = kernels.GridBlock(torch.from_numpy(steps), torch.from_numpy(offsets), most)
    found = kernels.feed_back_on_grid(grid, torch.from_numpy(upper), torch.from_numpy(weights))
    codes, errors = reference.feed_back_on_grid(steps, offsets, most, upper, weights)
    assert same(found[0], codes) and same(found[1], errors)
    slope = inside @ (weights - (codes * steps + offsets))
    wanted = reference.descend_on_grid(steps, offsets, most, inside, slope, codes)
    better = found[0].clone()
    change = kernels.descend_on_grid(grid, torch.from_numpy(inside), torch.from_numpy(slope), better)
    assert same(better, wanted[0]) and same(change, wanted[1])


def test_refused_operands() -> None:
    """What would be read wrongly is an error in Python, not a crash."""
    values, weights, h = codebook.fixed().values, torch.ones(64, 5), torch.ones(64)
    for bad in (weights.double(), torch.ones(5, 64).T, torch.ones(63, 5)):
        with pytest.raises(ValueError, match=r"expected a contiguous tensor torch\.float32"):
            kernels.search_scales(values, bad, h)
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        kernels.descend(values, torch.eye(64), weights, torch.zeros(64, 5), torch.ones(5))
    for left in (torch.ones(6, 64), torch.ones(8, 65), torch.ones(64, 8).T, torch.ones(8, 64).double()):
        with pytest.raises(ValueError, match="expected rows of 64 float32"):
            kernels.subtract_product(left, torch.ones(len(left), 5), weights)
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        kernels.subtract_product(torch.ones(8, 64), torch.ones(4, 5), weights)
    for steps, most in ((torch.ones(64, 4), 31), (torch.ones(64, 5), 256), (weights.double(), 31)):
        with pytest.raises(ValueError, match="expected"):
            kernels.feed_back_on_grid(kernels.GridBlock(steps, weights, most), torch.eye(64), weights)
    wide = torch.ones(257, 5)
    with pytest.raises(ValueError, match="expected up to 256 columns"):
        kernels.feed_back_on_grid(kernels.GridBlock(wide, wide, 31), torch.eye(257), wide)
