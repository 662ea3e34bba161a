"""Simulates in PyTorch, in floating point, how the runtime multiplies with an AGQ4 matrix; used by calibration.

The integer sums of the runtime are exact, so the product of the rounded input with the restored weights differs from
the runtime's only by float rounding.
"""

from __future__ import annotations

import numpy as np
import torch

from agq_gguf.format.blocks import GROUP_COLUMNS, Matrix, Parameters, channel_order
from agq_gguf.format.reference import rotate

_TINY = 2.0**-100  # tokens with a smaller maximum count as zero, as in the format
_ROTATION = torch.from_numpy(rotate(np.eye(GROUP_COLUMNS, dtype=np.float32)))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """`reference.rotate` of x [..., K] as a matrix product, which has a gradient; its rounding differs slightly."""
    return (x.unflatten(-1, (-1, GROUP_COLUMNS)) @ _ROTATION.to(x.device)).flatten(-2)


def rotate_in_place(hessian: torch.Tensor) -> None:
    """Replaces E[x x^T] [K, K] with that of `rotated` x; needs memory for one group of rows more."""
    for rows in hessian.split(GROUP_COLUMNS):
        rows.copy_(_ROTATION @ rotated(rows))


class Rounder:
    """Rounds inputs on `device` according to a matrix's parameters; matrices with the same input can share it."""

    def __init__(self, parameters: Parameters, columns: int, device: str | torch.device = "cpu") -> None:
        self.order = torch.from_numpy(channel_order(parameters.listed, columns).astype(np.int64)).to(device)
        self.back = self.order.argsort()
        exponents = np.ldexp(np.float32(1), parameters.exponents.astype(np.int32)).repeat(GROUP_COLUMNS)
        self.growth = torch.from_numpy(exponents).to(device)  # 2^e of each stored column
        self._limit = 127.0 if parameters.activation_bits == 8 else 7.0
        self._group = GROUP_COLUMNS if parameters.per_group else columns
        self.rotates = parameters.rotated

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32 in input-channel order, rounded; the gradient ignores the rounding."""
        with torch.no_grad():
            refined = x[..., self.order] / self.growth
            refined = (rotated(refined) if self.rotates else refined).unflatten(-1, (-1, self._group))
            largest = refined.abs().amax(-1, keepdim=True)
            factor = torch.where(largest < _TINY, 0.0, self._limit / largest)
            rounded = ((refined * factor).round() * (largest / self._limit)).flatten(-2)
            rounded = rotated(rounded) if self.rotates else rounded
            difference = (rounded * self.growth)[..., self.back] - x
        return x + difference


class BlockRounder:
    """Rounds inputs as ggml's kernels do: to 8 bits, with a scale for each block of channels."""

    def __init__(self, block: int) -> None:
        self._block = block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32, rounded; the gradient ignores the rounding."""
        with torch.no_grad():
            blocks = x.unflatten(-1, (-1, self._block))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            difference = ((blocks / step.clamp_min(_TINY)).round() * step).flatten(-2) - x
        return x + difference


def restored(matrix: Matrix, rounder: Rounder, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Weights [M, K] float32 in input-channel order; `scales` [M, K / 64] replaces the matrix's own."""
    device = rounder.growth.device
    codebook = torch.from_numpy(matrix.parameters.codebook.astype(np.float32) - 64).to(device)
    values = codebook[torch.from_numpy(matrix.codes).to(device).int()]
    used = torch.from_numpy(matrix.scales).to(device) if scales is None else scales
    spread = used.repeat_interleave(GROUP_COLUMNS, 1) * (matrix.parameters.tensor_scale / rounder.growth)
    weights = rotated(values * spread) if rounder.rotates else values * spread
    return weights[:, rounder.back]
