"""Scales and codebooks: which scale a group of weights gets, and which 16 values its codes stand for.

All functions are pure and work on torch float32 tensors. A group is 64 weights of one row; errors are weighted by `h`,
the mean square of the input channel (or the diagonal of the Hessian, which is the same up to a factor).
"""

from __future__ import annotations

from functools import cached_property

import torch

from agq_gguf.blocks import GROUP_COLUMNS, round_scale

# Values of the codes where none are learned: the fixed point of `learn` on Gaussian weights, rounded. The ends differ
# in size because the sign of a scale is free: the largest weight of a group goes to the far end, whatever its sign.
_FIXED = (-64, -48, -37, -28, -21, -15, -9, -4, 2, 8, 14, 20, 27, 34, 43, 54)

# Scales tried: those that put the largest weight of the group on an end of the codebook, times these.
_FACTORS = tuple(0.68 + 0.08 * i for i in range(6))
_FINER = (0.95, 0.975, 1.025, 1.05)  # then these times the best of them
_CHUNK = 1 << 11  # groups searched at a time: fits into the cache
_SAMPLE = 1 << 11  # groups a codebook is learned from
_ROUNDS = 4

# The nearest code of v is looked up at floor(8 v) + 512: exact for whole codebooks, whose midpoints are multiples of
# 1/2, and ten times as fast as a search.
_CELLS_PER_UNIT = 8
_N_CELLS = 128 * _CELLS_PER_UNIT


class Codebook:
    """16 ascending values in -64..63 with a table that finds the nearest."""

    def __init__(self, values: torch.Tensor):
        self.values = values  # [16] float32

    @cached_property
    def _codes(self) -> torch.Tensor:
        centres = (torch.arange(_N_CELLS) + 0.5) / _CELLS_PER_UNIT - 64
        return torch.bucketize(centres, (self.values[1:] + self.values[:-1]) / 2)

    @cached_property
    def _nearest(self) -> torch.Tensor:
        return self.values[self._codes]

    @staticmethod
    def _cells(normal: torch.Tensor) -> torch.Tensor:
        return torch.add(64 * _CELLS_PER_UNIT, normal, alpha=_CELLS_PER_UNIT).clamp_(0, _N_CELLS - 1).int().reshape(-1)

    def round(self, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes, int64, and their values, of weights divided by their scale, [n]."""
        codes = self._codes.index_select(0, self._cells(normal))
        return codes, self.values.index_select(0, codes)

    def encode(self, normal: torch.Tensor) -> torch.Tensor:
        """Nearest codes, int64, of weights divided by their scale, any shape."""
        return self._codes.index_select(0, self._cells(normal)).reshape(normal.shape)

    def nearest(self, normal: torch.Tensor) -> torch.Tensor:
        """Nearest values, float32, of weights divided by their scale, any shape."""
        return self._nearest.index_select(0, self._cells(normal)).reshape(normal.shape)


def fixed() -> Codebook:
    """The codebook used where none is learned."""
    return Codebook(torch.tensor(_FIXED, dtype=torch.float32))


def reciprocal(scales: torch.Tensor) -> torch.Tensor:
    """1 / D, and 0 for the scale 0 of an all-zero group."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def storable(scales: torch.Tensor) -> torch.Tensor:
    """`blocks.round_scale` on a torch tensor."""
    return torch.from_numpy(round_scale(scales.numpy()))


def search_scales(weights: torch.Tensor, h: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Best storable scale [N] for each group of `weights` [N, 64], with error weights `h` [N or 1, 64].

    For each candidate (largest weight to either end of the codebook, times `_FACTORS`) the codes are fixed and the
    scale is refitted in closed form; with codes q the weighted error of the best scale is
    sum(h w^2) - sum(h w q)^2 / sum(h q^2).
    """
    return torch.cat([
        _search(weights[i : i + _CHUNK], h[i : i + _CHUNK] if len(h) > 1 else h, codebook)
        for i in range(0, len(weights), _CHUNK)
    ])  # fmt: skip


def _search(weights: torch.Tensor, h: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
    weighted, shared = weights * h, h[0] if len(h) == 1 else None
    best_gain, best = torch.zeros_like(largest), torch.zeros_like(largest)

    def try_scale(scale: torch.Tensor) -> None:
        nonlocal best_gain, best
        q = codebook.nearest(weights * reciprocal(scale)[:, None])
        product = torch.linalg.vecdot(weighted, q)
        square = (q * q) @ shared if shared is not None else torch.linalg.vecdot(q * q, h)
        refitted = product / square.clamp_min(torch.finfo(torch.float32).tiny)
        gain = product * refitted
        better = gain > best_gain
        best_gain, best = torch.where(better, gain, best_gain), torch.where(better, refitted, best)

    for end in (float(codebook.values[0]), float(codebook.values[-1])):
        for factor in _FACTORS:
            try_scale(largest * (factor / end))
    coarse = best
    for factor in _FINER:
        try_scale(coarse * factor)
    return storable(best)


def learn(matrix: torch.Tensor, importance: torch.Tensor) -> Codebook:
    """Codebook of whole numbers for a matrix [M, K] whose columns have the error weights `importance` [K].

    Weighted Lloyd iterations on weights divided by their scales, alternating with `search_scales`, on a sample of the
    groups. Returns the fixed codebook where the learned one is not better.
    """
    groups, columns = matrix.reshape(-1, GROUP_COLUMNS), importance.reshape(-1, GROUP_COLUMNS)
    # Steps of a large prime: no two alike, spread over all rows and all groups of a row.
    chosen = torch.arange(min(len(groups), _SAMPLE)) * 2147483647 % len(groups)
    weights, h = groups[chosen], columns[chosen % len(columns)]
    codebook = fixed()
    for _ in range(_ROUNDS):
        codebook = _lloyd(weights, h, codebook)
    codebook = _whole(codebook)
    return codebook if _error(weights, h, codebook) < _error(weights, h, fixed()) else fixed()


def _lloyd(weights: torch.Tensor, h: torch.Tensor, codebook: Codebook) -> Codebook:
    """One round: scales, codes, then each code's value becomes the weighted mean of what it stands for."""
    scales = search_scales(weights, h, codebook)
    normal = weights * reciprocal(scales)[:, None]
    codes = codebook.encode(normal).reshape(-1)
    mass = (h * scales.square()[:, None]).reshape(-1).double()
    total = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, mass)
    mean = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, mass * normal.reshape(-1)) / total
    moved = torch.where(total > 0, mean, codebook.values.double()).float().sort().values
    return Codebook(moved * (64 / moved.abs().max()))


def _whole(codebook: Codebook) -> Codebook:
    values = codebook.values
    if values.max() > -values.min():
        values = -values.flip(0)  # the far end is negative: -64 exists, 64 does not; scales flip their sign
    return Codebook(values.round().clamp(-64, 63))


def _error(weights: torch.Tensor, h: torch.Tensor, codebook: Codebook) -> float:
    scales = search_scales(weights, h, codebook)[:, None]
    difference = weights - scales * codebook.nearest(weights * reciprocal(scales))
    return float((difference.square() * h).sum(dtype=torch.float64))
