"""Equalization: channels of a normalized input are made alike, and the matrices behind take the factors back.

A norm's weight (and bias) divided by s, the columns of all matrices that read it times s: the model computes the same,
but outlier channels no longer set the scale for all others (SmoothQuant, arXiv 2211.10438), and groups of weights span
less. With s = sqrt(rms of the channel / rms of its column) the result does not depend on how the factors were
shared out in the source: a model whose norms carry huge channels is quantized as if they did not. It costs no bits and
no time. It is done where rounding the activations costs noticeably less with it; elsewhere it nothing was to be
gained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats, WeightStats
from agq_gguf.format.blocks import GROUP_COLUMNS, channel_order
from agq_gguf.matrix import two_refine

_SILENT = 1e-2  # a channel counts with at least this share of the median contribution (rms times rms of its column)
_WORTH = 1e-4  # of the products' energy; 4-bit weights cost about 1e-3
_MOST_LEVEL = 4.0  # exponent of the most that a column is divided by: keys and values may be kept in F16
_MOST = 2.0**12  # between the largest and the geometric mean


def choose(
    stats: InputStats,
    weights: list[NDArray[np.float32]],
    capacity: int,
    bits: int,
    scale: str,
    refined: bool,
) -> NDArray[np.float32] | None:
    """`factors` if they lower what int8 (or int4) rounding of the input adds to the products, else None.

    Both ways are tried with the refinement that the quantizer would choose for them. The noise of a channel counts with
    the square of its column and is taken as a share of the products' energy.
    """
    sample = stats.sample
    if sample is None or not len(sample):
        return None
    s = factors(stats.mean_square, weights)
    column = sum(np.square(w, dtype=np.float64).sum(axis=0) for w in weights)
    energy = float((stats.mean_square * column).sum())

    def noise(divisor: NDArray[np.float32]) -> float:
        found = two_refine.choose(sample / divisor, capacity, bits, scale, refined)
        growth = (found.noise * np.exp2(2.0 * found.exponents)).repeat(GROUP_COLUMNS)
        order = channel_order(found.listed, stats.columns)
        return float((growth * (column * divisor.astype(np.float64) ** 2)[order]).sum())

    gain = noise(np.ones_like(s)) - noise(s)
    return s if gain > _WORTH * energy > 0 else None


def factors(mean_square: NDArray[np.float32], weights: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """s [K] for an input with E[x^2] [K] and the matrices [M, K] that multiply it; geometric mean 1.

    Channels whose columns are all zero keep 1.
    """
    size = np.sqrt(mean_square.astype(np.float64))
    column = np.sqrt(sum(np.square(w, dtype=np.float64).sum(axis=0) for w in weights))
    used = column > 0
    contribution = (size * column)[used]
    found = np.ones(len(size))
    if not contribution.any():
        return found.astype(np.float32)
    least = _SILENT * np.median(contribution[contribution > 0])
    found[used] = np.sqrt(np.maximum(size[used], least / column[used]) / column[used])
    found[used] /= np.exp(np.log(found[used]).mean())
    return np.clip(found, 1 / _MOST, _MOST).astype(np.float32)


def level(square: torch.Tensor) -> torch.Tensor:
    """Divisors [K] that make columns with mean squares `square` [K] alike; geometric mean 1, 1 for columns of zeros."""
    found = torch.ones_like(square)
    used = square > 0
    if used.any():
        size = square[used].sqrt().log()
        found[used] = (size - size.mean()).clamp(-_MOST_LEVEL, _MOST_LEVEL).exp()
    return found


def scaled(stats: WeightStats, s: NDArray[np.float32]) -> WeightStats:
    """Statistics of x / s."""
    return WeightStats(_scaled(stats.whole, s), tuple(_scaled(part, s) for part in stats.experts))


def _scaled(stats: InputStats, s: NDArray[np.float32]) -> InputStats:
    return replace(
        stats,
        mean_square=stats.mean_square / s**2,
        abs_max=None if stats.abs_max is None else stats.abs_max / s,
        sample=None if stats.sample is None else stats.sample / s,
        hessian=None if stats.hessian is None else stats.hessian / s / s[:, None],
    )
