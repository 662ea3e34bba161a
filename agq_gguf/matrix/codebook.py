"""Chooses the scale of each group of weights, and the codebook: the 16 values that codes stand for.

All functions are pure and work on torch float32 tensors. A group is 64 weights of one row. Errors are weighted by `h`,
the mean square of the input channel (or the diagonal of the Hessian, which is the same up to a factor). A batch of n
groups is transposed, [64, n].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agq_gguf.calibration.sampling import spread
from agq_gguf.format.blocks import GROUP_COLUMNS, round_scale
from agq_gguf.matrix import kernels

# The codebook if none is learned: the fixed point of `learn` on Gaussian weights, rounded. Its first and last value
# differ in size because a scale may be negative: the largest weight of a group always gets the value -64.
_FIXED = (-64, -48, -37, -28, -21, -15, -9, -4, 2, 8, 14, 20, 27, 34, 43, 54)

_SAMPLE = 1 << 11  # groups a codebook is learned from
_ROUNDS = 4


@dataclass(frozen=True)
class Codebook:
    """16 ascending values in -64..63."""

    values: torch.Tensor  # [16] float32

    def encode(self, normal: torch.Tensor) -> torch.Tensor:
        """Nearest codes (int64) of weights divided by their scale, any shape; at a midpoint the larger code."""
        return torch.bucketize(normal, (self.values[1:] + self.values[:-1]) / 2, right=True)

    def nearest(self, normal: torch.Tensor) -> torch.Tensor:
        """Nearest values (float32) of weights divided by their scale, any shape."""
        return self.values[self.encode(normal)]


def fixed() -> Codebook:
    """The codebook that is used if none is learned."""
    return Codebook(torch.tensor(_FIXED, dtype=torch.float32))


def reciprocal(scales: torch.Tensor) -> torch.Tensor:
    """1 / D, and 0 for the scale 0 of an all-zero group."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def storable(scales: torch.Tensor) -> torch.Tensor:
    """`blocks.round_scale` on a torch tensor."""
    return torch.from_numpy(round_scale(scales.cpu().numpy())).to(scales.device)


def search_scales(weights: torch.Tensor, importance: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Best storable scales [M, K / 64] for `weights` [M, K]; a squared error in column k costs `importance[k]`."""
    transposed = weights.T.contiguous()
    found = [
        kernels.search_scales(codebook.values, columns, costs)
        for columns, costs in zip(transposed.split(GROUP_COLUMNS), importance.split(GROUP_COLUMNS), strict=True)
    ]
    return torch.stack(found, dim=1)


def learn(matrix: torch.Tensor, importance: torch.Tensor) -> Codebook:
    """Learns a codebook of whole numbers for a matrix [M, K] whose columns have the error weights `importance` [K].

    Weighted Lloyd iterations on weights divided by their scales alternate with `search_scales`, on a sample of the
    groups. Returns the fixed codebook if the learned one is not better.
    """
    groups, columns = matrix.reshape(-1, GROUP_COLUMNS), importance.reshape(-1, GROUP_COLUMNS)
    chosen = torch.from_numpy(spread(_SAMPLE, len(groups)))
    weights, h = groups[chosen].T.contiguous(), columns[chosen % len(columns)].T.contiguous()
    codebook = fixed()
    for _ in range(_ROUNDS):
        codebook = _lloyd(weights, h, codebook)
    codebook = _whole(codebook)
    return codebook if _error(weights, h, codebook) < _error(weights, h, fixed()) else fixed()


def _lloyd(weights: torch.Tensor, h: torch.Tensor, codebook: Codebook) -> Codebook:
    """One round: finds scales and codes, then sets each code's value to the weighted mean of its weights."""
    scales = kernels.search_scales(codebook.values, weights, h)
    normal = weights * reciprocal(scales)
    codes = codebook.encode(normal).reshape(-1)
    mass = (h * scales.square()).reshape(-1).double()
    total = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, mass)
    mean = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, mass * normal.reshape(-1)) / total
    moved = torch.where(total > 0, mean, codebook.values.double()).float().sort().values
    return Codebook(moved * (64 / moved.abs().max()))


def _whole(codebook: Codebook) -> Codebook:
    values = codebook.values
    if values.max() > -values.min():
        values = -values.flip(
            0
        )  # the largest value must be negative, since -64 exists and 64 does not; scales flip sign
    return Codebook(values.round().clamp(-64, 63))


def _error(weights: torch.Tensor, h: torch.Tensor, codebook: Codebook) -> float:
    scales = kernels.search_scales(codebook.values, weights, h)
    difference = weights - scales * codebook.nearest(weights * reciprocal(scales))
    return float((difference.square() * h).sum(dtype=torch.float64))
