"""Two-refine: which channels share a group and which power of two a group is divided by, so that int8 loses least.

The runtime has one scale per token, set by its largest refined activation max |x| 2^-e. A channel of exponent e is then
quantized with a noise of 4^e s^2 / 12. Raising e where the outliers are makes s smaller for all other channels: the
idea of two-refine activations in Agile-Quant (arXiv 2312.05693). Choices depend on the input alone, so all weights that
multiply the same input make the same ones, and the runtime quantizes it once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.blocks import GROUP_COLUMNS, MAX_EXPONENT, channel_order

# How much less noise, as a share of the input's energy, a choice must bring; 4-bit weights cost about 5e-3.
# Exponents are free at run time. An order costs the runtime a gather per token, and the weights some precision: alone
# in its group, the weight of an outlier channel can have the group's scale to itself.
_WORTH_EXPONENTS = 2e-5
_WORTH_ORDER = 2e-4
_LISTED_GROUPS = (1, 2, 4)  # how many groups of outlier channels are tried
_LISTABLE = 1 << 16  # channel numbers are stored in 16 bits
_SWEEPS = 3


@dataclass(frozen=True)
class Refinement:
    """Order and exponents for one input."""

    listed: NDArray[np.uint16]  # channels that come first in the stored order; empty: no reordering
    exponents: NDArray[np.uint8]  # [K / 64]
    noise: float  # mean square of what int8 (or int4) rounding adds to a refined channel, E[s^2] / 12


def none(columns: int) -> Refinement:
    """No order, no exponents."""
    return Refinement(np.empty(0, np.uint16), np.zeros(columns // GROUP_COLUMNS, np.uint8), 0.0)


def choose(sample: NDArray[np.float32], capacity: int, bits: int, per_group: bool, enabled: bool = True) -> Refinement:
    """Best refinement for an input of which `sample` [n, K] holds some rows; at most `capacity` channels are listed.

    With a scale per group there is nothing to gain: each group has its own already.
    """
    size, columns = np.abs(sample.astype(np.float64)), sample.shape[1]
    plain = none(columns)
    energy = float((size * size).sum(axis=1).mean()) if len(size) else 0.0
    if not energy > 0:
        return plain
    limit = 127 if bits == 8 else 7
    step = 1 / (12 * limit * limit)
    unit = energy / step  # a cost of this much is as large as the input itself
    natural = _group_maxima(size, plain.listed)
    if per_group:
        return Refinement(plain.listed, plain.exponents, float((natural**2).mean()) * step)
    best, best_cost = plain.exponents, _cost(natural, plain.exponents)
    listed, maxima = plain.listed, natural
    if enabled:
        exponents = _descend(natural)
        if best_cost - _cost(natural, exponents) > _WORTH_EXPONENTS * unit:
            best, best_cost = exponents, _cost(natural, exponents)
        by_peak = np.argsort(-size.max(axis=0), kind="stable")
        for groups in _LISTED_GROUPS:
            first = by_peak[: groups * GROUP_COLUMNS].astype(np.uint16)
            if len(first) > capacity or len(first) >= columns or columns > _LISTABLE:
                break
            ordered = _group_maxima(size, first)
            exponents = _descend(ordered)
            cost = _cost(ordered, exponents)
            if best_cost - cost > _WORTH_ORDER * unit:
                best, best_cost, listed, maxima = exponents, cost, first, ordered
    peak = (maxima * np.exp2(-best.astype(np.float64))).max(axis=1)
    return Refinement(listed, best, float((peak**2).mean()) * step)


def _group_maxima(size: NDArray[np.float64], listed: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Largest |x| of each token in each group of the stored order, [n, K / 64]."""
    ordered = size[:, channel_order(listed, size.shape[1])]
    found: NDArray[np.float64] = ordered.reshape(len(size), -1, GROUP_COLUMNS).max(axis=2)
    return found


def _cost(maxima: NDArray[np.float64], exponents: NDArray[np.uint8]) -> float:
    """Noise over all channels, up to the factor 1 / (12 limit^2)."""
    peak = (maxima * np.exp2(-exponents.astype(np.float64))).max(axis=1)
    return float((peak**2).mean() * GROUP_COLUMNS * np.exp2(2.0 * exponents).sum())


def _descend(maxima: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Exponents by coordinate descent from zero; groups with the largest peaks first."""
    exponents = np.zeros(maxima.shape[1], np.uint8)
    cost = _cost(maxima, exponents)
    by_peak = np.argsort(-maxima.max(axis=0), kind="stable")
    for _ in range(_SWEEPS):
        before = cost
        # Several groups may have to move together: the k groups with the largest peaks by one, for each k ...
        for k in range(1, len(by_peak)):
            trial = exponents.copy()
            trial[by_peak[:k]] = np.minimum(trial[by_peak[:k]] + 1, MAX_EXPONENT)
            if (found := _cost(maxima, trial)) < cost:
                exponents, cost = trial, found
        # ... then each for itself.
        for group in by_peak:
            for change in (1, -1):
                value = int(exponents[group]) + change
                if not 0 <= value <= MAX_EXPONENT:
                    continue
                trial = exponents.copy()
                trial[group] = value
                if (found := _cost(maxima, trial)) < cost:
                    exponents, cost = trial, found
        if cost == before:
            break
    return exponents - exponents.min()  # only differences matter
