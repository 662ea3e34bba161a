"""Two-refine: chooses which channels share a group and by which power of two each group is divided, for int8 rounding.

If the runtime uses one scale s per token, the largest refined activation max |x| 2^-e sets it. A channel with exponent
e then gets rounding noise of 4^e s^2 / 12. Raising e for groups with outliers makes s smaller for all other channels;
this is the idea of two-refine activations in Agile-Quant (arXiv 2312.05693). The choices depend only on the input, so
they are the same for all weights with that input, and the runtime quantizes the input once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agq_gguf.format.blocks import GROUP_COLUMNS, MAX_EXPONENT, channel_order
from agq_gguf.format.reference import rotate

# Minimum reduction of noise by exponents and by a channel order, as a share of a token's energy; 4-bit weights cost
# about 5e-3. Ordering outlier channels together costs weights some precision: alone in its group, the weight of an
# outlier channel can use the group's scale for itself.
_WORTH_EXPONENTS = 2e-5
_WORTH_ORDER = 2e-4
_OUTLIER_GROUPS = (0, 1, 2, 4)  # numbers of groups with outlier channels to try
_WORTH_SORTING = 0.05  # minimum variance of log energy inside groups; the noise of a small sample stays below it
_SILENT = 1e-6  # energies below this share of the largest count as equal
_NEARLY_ALL = 0.9  # key matrices of grouped heads, with 256 rows, have room to list this share of the channels
_LISTABLE = 1 << 16  # channel numbers are stored in 16 bits
_SWEEPS = 3


@dataclass(frozen=True)
class Refinement:
    """Order and exponents for one input."""

    listed: NDArray[np.uint16]  # channels that come first in the stored order; empty: no reordering
    exponents: NDArray[np.uint8]  # [K / 64]
    noise: NDArray[np.float64]  # [K / 64], E[s^2] / 12: what int8 (int4) rounding adds to a refined channel's square


def none(columns: int) -> Refinement:
    """No order, no exponents."""
    groups = columns // GROUP_COLUMNS
    return Refinement(np.empty(0, np.uint16), np.zeros(groups, np.uint8), np.zeros(groups))


def choose(sample: NDArray[np.float32], capacity: int, bits: int, scale: str, enabled: bool = True) -> Refinement:
    """Best refinement for an input; `sample` [n, K] holds some of its rows; lists at most `capacity` channels.

    `scale` is one of `blocks.ACTIVATION_SCALES`. If nearly all channels can be listed, they are listed by descending
    energy. Channels of similar energy then share a group and the scale of their weights, which lowers the error of
    weights (docs/research/format-study.md), and outliers share groups. A shorter list would mix the other channels
    badly, so it holds only outliers, and only if activations gain by it. Rotation gives the channels of a group similar
    sizes. Then exponents gain nothing and an order loses (docs/research/quality.md), so neither is used.
    """
    x, columns = sample.astype(np.float64), sample.shape[1]
    plain = none(columns)
    energy = (x * x).sum(axis=1)
    if not energy.any():
        return plain
    x, energy = x[energy > 0], energy[energy > 0]
    limit = 127 if bits == 8 else 7
    step = 1 / (12 * limit * limit)
    if scale == "rotated":
        return replace(plain, noise=(_group_maxima(rotate(x), plain.listed) ** 2).mean(axis=0) * step)
    # The noise of a token is divided by its energy, because the next norm or sum scales it in the same way.
    best, best_cost = plain, np.inf
    for listed in _orders(np.abs(x), capacity) if enabled else [plain.listed]:
        maxima = _group_maxima(x, listed)
        relative = maxima / np.sqrt(energy)[:, None]
        exponents, cost = plain.exponents, _cost(relative, plain.exponents)
        # With a scale per group exponents gain nothing, because each group already has its own scale.
        if scale != "token":
            cost = float((relative**2).mean(axis=0).sum() * GROUP_COLUMNS)
        elif enabled:
            found = _descend(relative)
            if cost - _cost(relative, found) > _WORTH_EXPONENTS / step:
                exponents, cost = found, _cost(relative, found)
        if best_cost - cost > (_WORTH_ORDER / step if np.isfinite(best_cost) else 0):
            refined = maxima * np.exp2(-exponents.astype(np.float64))
            peaks = refined if scale != "token" else np.broadcast_to(refined.max(axis=1)[:, None], refined.shape)
            best, best_cost = Refinement(listed, exponents, (peaks**2).mean(axis=0) * step), cost
    return best


def _orders(size: NDArray[np.float64], capacity: int) -> list[NDArray[np.uint16]]:
    """Lists of channels to try, for |x| = `size` [n, K]."""
    columns = size.shape[1]
    if columns > _LISTABLE:
        return [none(columns).listed]
    energy = (size * size).mean(axis=0)
    if capacity >= _NEARLY_ALL * columns and _spread(energy) > _WORTH_SORTING:
        by_energy = np.argsort(-energy, kind="stable")
        return [by_energy[: min(capacity, columns)].astype(np.uint16)]
    by_peak = np.argsort(-size.max(axis=0), kind="stable")
    lengths = [groups * GROUP_COLUMNS for groups in _OUTLIER_GROUPS]
    return [by_peak[:n].astype(np.uint16) for n in lengths if n <= min(capacity, columns - 1)]


def _spread(energy: NDArray[np.float64]) -> float:
    """How much the channels of a group differ before sorting: mean variance of the logarithm of their energy."""
    logs = np.log(np.maximum(energy, energy.max() * _SILENT))
    return float(logs.reshape(-1, GROUP_COLUMNS).var(axis=1).mean())


def _group_maxima(x: NDArray[np.float64], listed: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Largest |x| of each token in each group of the stored order, [n, K / 64]."""
    ordered = np.abs(x)[:, channel_order(listed, x.shape[1])]
    found: NDArray[np.float64] = ordered.reshape(len(x), -1, GROUP_COLUMNS).max(axis=2)
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
        # Several groups may have to change together: raise the k groups with the largest peaks by one, for each k ...
        for k in range(1, len(by_peak)):
            trial = exponents.copy()
            trial[by_peak[:k]] = np.minimum(trial[by_peak[:k]] + 1, MAX_EXPONENT)
            if (found := _cost(maxima, trial)) < cost:
                exponents, cost = trial, found
        # ... then change each group alone.
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
