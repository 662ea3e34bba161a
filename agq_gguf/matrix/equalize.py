"""Equalization: moves factors from a norm into the matrices that follow, so that channels get similar sizes.

The norm's weight (and bias) is divided by s, and the columns of all matrices that read it are multiplied by s. The
model computes the same function, but outlier channels no longer set the scale of all others (SmoothQuant, arXiv
2211.10438), and groups of weights span a smaller range. With s = sqrt(rms of the channel / rms of its column) the
result does not depend on how the source divides the factors between norm and matrices. This costs no bits and no time.
It is done only where it lowers the error from rounding the activations noticeably; elsewhere it gained nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats, WeightStats
from agq_gguf.format.blocks import GROUP_COLUMNS, TYPE_NAME, channel_order
from agq_gguf.matrix import stock_types, two_refine

_SILENT = 1e-2  # minimum contribution of a channel (rms times rms of its column), as a share of the median
_WORTH = 1e-4  # minimum gain, as a share of the products' energy; 4-bit weights cost about 1e-3
_MOST_LEVEL = 4.0  # a column is divided by at most exp of this, because keys and values may be kept in F16
_MOST = 2.0**12  # largest factor, relative to the geometric mean


def choose(
    stats: InputStats,
    weights: Sequence[tuple[str, NDArray[np.float32]]],
    capacity: int,
    bits: int,
    scale: str,
    refined: bool,
) -> NDArray[np.float32] | None:
    """`factors` if they lower the error that int8 (or int4) rounding of the input adds to the products, else None.

    `weights` are types and matrices [M, K]. Both variants are tried with the refinement that the quantizer would choose
    for them, and with the blocks of a stock type's kernels. The noise of a channel is weighted by the square of its
    column, and the sum is compared with the products' energy.
    """
    sample = stats.sample
    if sample is None or not len(sample):
        return None
    s = factors(stats.mean_square, [matrix for _, matrix in weights])
    columns: dict[int, NDArray[np.float64]] = {}  # sums of squares, by the block of channels that shares a scale
    for type_name, matrix in weights:
        block = 0 if type_name == TYPE_NAME else stock_types.input_block(type_name)
        columns[block] = columns.get(block, 0) + np.square(matrix, dtype=np.float64).sum(axis=0)
    energy = float(sum((stats.mean_square * column).sum() for column in columns.values()))

    def noise(divisor: NDArray[np.float32]) -> float:
        x, total = sample / divisor, 0.0
        for block, column in columns.items():
            scaled = column * divisor.astype(np.float64) ** 2
            if block:
                steps = np.abs(x).reshape(len(x), -1, block).max(-1) / 127
                total += float((np.square(steps, dtype=np.float64).mean(0).repeat(block) / 12 * scaled).sum())
                continue
            found = two_refine.choose(x, capacity, bits, scale, refined)
            growth = (found.noise * np.exp2(2.0 * found.exponents)).repeat(GROUP_COLUMNS)
            total += float((growth * scaled[channel_order(found.listed, stats.columns)]).sum())
        return total

    gain = noise(np.ones_like(s)) - noise(s)
    return s if gain > _WORTH * energy > 0 else None


def factors(mean_square: NDArray[np.float32], weights: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """s [K] for an input with E[x^2] [K] and the matrices [M, K] that read it; the geometric mean of s is 1.

    Channels whose columns are all zero get 1.
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
    """Divisors [K] that equalize columns with mean squares `square` [K]; geometric mean 1; 1 for zero columns."""
    found = torch.ones_like(square)
    used = square > 0
    if used.any():
        size = square[used].sqrt().log()
        found[used] = (size - size.mean()).clamp(-_MOST_LEVEL, _MOST_LEVEL).exp()
    return found


def scaled(stats: WeightStats, s: NDArray[np.float32]) -> WeightStats:
    """Statistics of x / s; Hessians are overwritten, which saves copies."""
    return WeightStats(_scaled(stats.whole, s), tuple(_scaled(part, s) for part in stats.experts))


def _scaled(stats: InputStats, s: NDArray[np.float32]) -> InputStats:
    if stats.hessian is not None:
        np.divide(stats.hessian, s, out=stats.hessian)
        np.divide(stats.hessian, s[:, None], out=stats.hessian)
    return replace(
        stats,
        mean_square=stats.mean_square / s**2,
        abs_max=None if stats.abs_max is None else stats.abs_max / s,
        sample=None if stats.sample is None else stats.sample / s,
    )
