"""Rounding by the definition: cpp/kernels/rounding.h once more, in numpy, for all rows side by side.

binary32 throughout and in the order that a reader would take, so that the kernels must give every bit of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from agq_gguf.format.blocks import round_scale

Floats = NDArray[np.float32]
_COARSE = np.array([0.68, 0.76, 0.84, 0.92, 1.0, 1.08], np.float32)
_FINE = np.array([0.95, 0.975, 1.025, 1.05], np.float32)
_AROUND = np.array([0.88, 0.94, 1.0, 1.06, 1.12], np.float32)
_TINY = np.finfo(np.float32).tiny


def nearest(values: Floats, x: Floats) -> NDArray[np.uint8]:
    """Codes of the nearest of 16 ascending values; the larger one from the midpoint on."""
    return np.searchsorted((values[:-1] + values[1:]) / 2, x, side="right").astype(np.uint8)


def inverse(scale: Floats) -> Floats:
    """1 / D, and 0 for D = 0."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _best_scale(values: Floats, weights: Floats, h: Floats) -> Floats:
    """The exact scale [n] for weights [64, n], costs h [64, n]."""
    n = weights.shape[1]
    best, best_gain = np.zeros(n, np.float32), np.zeros(n, np.float32)

    def attempt(scale: Floats) -> None:
        normal = weights * inverse(scale)
        product, square = np.zeros(n, np.float32), np.zeros(n, np.float32)
        for j in range(64):
            q = values[nearest(values, normal[j])]
            weighted = q * h[j]
            product += weighted * weights[j]
            square += weighted * q
        refitted = product / np.maximum(square, _TINY)
        gain = product * refitted
        better = gain > best_gain
        best[better], best_gain[better] = refitted[better], gain[better]

    largest = weights[np.abs(weights).argmax(0), np.arange(n)]
    for end in (values[0], values[15]):
        for factor in _COARSE:
            if end != 0:
                attempt(largest * (factor / end))
    found = best.copy()
    for factor in _FINE:
        attempt(found * factor)
    return best


def search_scales(values: Floats, weights: Floats, h: Floats) -> Floats:
    """Storable scales [n] for weights [64, n] and costs [64] or [64, n]."""
    return round_scale(_best_scale(values, weights, np.broadcast_to(h.reshape(64, -1), weights.shape)))


def feed_back(values: Floats, upper: Floats, weights: Floats) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Codes [64, n], scales [n] and (W - Q) / U_jj [64, n] of a group."""
    diagonal = upper.diagonal()
    found = search_scales(values, weights, np.float32(1) / (diagonal * diagonal))
    attempts = []
    for factor in _AROUND:
        scale = round_scale(found * factor)
        rest, cost = weights.copy(), np.zeros_like(scale)
        codes, errors = np.empty(weights.shape, np.uint8), np.empty_like(weights)
        for j in range(64):
            codes[j] = nearest(values, rest[j] * inverse(scale))
            errors[j] = (rest[j] - values[codes[j]] * scale) * (np.float32(1) / upper[j, j])
            cost += errors[j] * errors[j]
            for i in range(j + 1, 64):
                rest[i] -= upper[j, i] * errors[j]
        attempts.append((cost, codes, scale, errors))
    best = np.argmin([cost for cost, *_ in attempts], axis=0)
    rows = np.arange(weights.shape[1])
    codes, scales, errors = (np.stack(parts) for parts in list(zip(*attempts, strict=True))[1:])
    return codes[best, :, rows].T, scales[best, rows], errors[best, :, rows].T


def descend(
    values: Floats, inside: Floats, slope: Floats, codes: NDArray[np.uint8], scales: Floats
) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Better codes [64, n] and scales [n], and the change of Q [64, n]."""
    q, before = values[codes], values[codes] * scales
    product = np.zeros_like(slope)
    for i in range(64):
        product += inside[:, i : i + 1] * q[i]
    linear, square = np.zeros_like(scales), np.zeros_like(scales)
    for j in range(64):
        linear += q[j] * slope[j]
        square += q[j] * product[j]
    step = np.divide(linear, square, out=np.zeros_like(linear), where=square != 0)
    change = round_scale(scales + step) - scales
    change = np.where(change * (np.float32(2) * linear - change * square) > 0, change, np.float32(0))
    scales, rest = scales + change, slope - change * product
    codes = codes.copy()
    for j in range(64):
        codes[j] = nearest(values, q[j] + rest[j] * (np.float32(1) / inside[j, j]) * inverse(scales))
        moved = (values[codes[j]] - q[j]) * scales
        q[j] = values[codes[j]]
        for i in range(j + 1, 64):
            rest[i] -= inside[j, i] * moved
    return codes, scales, q * scales - before


def subtract_product(left: Floats, right: Floats, out: Floats) -> Floats:
    """`out` [64, n] minus left^T right, for left [k, 64] and right [k, n]; one product after another."""
    found = out.copy()
    for i in range(len(left)):
        found -= left[i, :, None] * right[i]
    return found


def on_grid(steps: Floats, offsets: Floats, most: int, x: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """The nearest codes 0 to `most` for x [n], ties to even, and what they stand for."""
    code = np.rint(np.clip((x - offsets) * inverse(steps), np.float32(0), np.float32(most)))
    return code.astype(np.uint8), code * steps + offsets


def feed_back_on_grid(
    steps: Floats, offsets: Floats, most: int, upper: Floats, weights: Floats
) -> tuple[NDArray[np.uint8], Floats]:
    """Codes and (W - Q) / U_jj [columns, n] of a block with given steps and offsets [columns, n]."""
    rest, codes, errors = weights.copy(), np.empty(weights.shape, np.uint8), np.empty_like(weights)
    for j in range(len(weights)):
        codes[j], values = on_grid(steps[j], offsets[j], most, rest[j])
        errors[j] = (rest[j] - values) * (np.float32(1) / upper[j, j])
        for i in range(j + 1, len(weights)):
            rest[i] -= upper[j, i] * errors[j]
    return codes, errors


def descend_on_grid(
    steps: Floats, offsets: Floats, most: int, inside: Floats, slope: Floats, codes: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], Floats]:
    """Better codes, and the change of Q [columns, n]."""
    rest, found, change = slope.copy(), codes.copy(), np.empty_like(slope)
    for j in range(len(slope)):
        before = codes[j].astype(np.float32) * steps[j] + offsets[j]
        wanted = before + rest[j] * (np.float32(1) / inside[j, j])
        found[j], values = on_grid(steps[j], offsets[j], most, wanted)
        change[j] = values - before
        for i in range(j + 1, len(slope)):
            rest[i] -= inside[j, i] * change[j]
    return found, change
