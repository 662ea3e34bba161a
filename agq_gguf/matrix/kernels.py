"""The compiled inner loops of rounding, for torch tensors; cpp/kernels/rounding.h defines what each computes.

Matrices of weights are transposed here, [64, n]: one group of columns of n rows; on a grid, a block of columns. Calls
release Python's lock, so other threads can run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agq_gguf.format.blocks import GROUP_COLUMNS
from agq_gguf.native import plugin_library

_MOST_COLUMNS = 256  # of a block on a grid


def _address(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"expected a contiguous tensor {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.data_ptr()


def search_scales(values: torch.Tensor, weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Storable scales [n] with the least loss for `weights` [64, n] and the ascending codebook `values` [16].

    A squared error in column j costs h[j]; `h` is the same for all rows ([64]) or given for each ([64, n]).
    """
    n, each = weights.shape[1], h.ndim == 2
    scales = torch.empty(n)
    with plugin_library() as library:
        library.agq_search_scales(
            _address(values, (16,)),
            _address(weights, (GROUP_COLUMNS, n)),
            _address(h, (GROUP_COLUMNS, n) if each else (GROUP_COLUMNS,)),
            each,
            n,
            scales.data_ptr(),
        )
    return scales


def feed_back(
    values: torch.Tensor, upper: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Error feedback inside a group: codes [64, n] uint8, scales [n] and (W - Q) / U_jj [64, n].

    `upper` is the group's part of U [64, 64]; `weights` [64, n] include the feedback from earlier groups.
    """
    n = weights.shape[1]
    codes, scales, errors = torch.empty(weights.shape, dtype=torch.uint8), torch.empty(n), torch.empty_like(weights)
    with plugin_library() as library:
        library.agq_feed_back(
            _address(values, (16,)),
            _address(upper, (GROUP_COLUMNS, GROUP_COLUMNS)),
            _address(weights, (GROUP_COLUMNS, n)),
            n,
            codes.data_ptr(),
            scales.data_ptr(),
            errors.data_ptr(),
        )
    return codes, scales, errors


def descend(
    values: torch.Tensor, inside: torch.Tensor, slope: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """One round of coordinate descent inside a group; improves `codes` [64, n] and `scales` [n] in place.

    `inside` is the group's part of H [64, 64], `slope` its part of H (W - Q) [64, n]. Returns the change of Q [64, n].
    """
    n = slope.shape[1]
    change = torch.empty_like(slope)
    with plugin_library() as library:
        library.agq_descend(
            _address(values, (16,)),
            _address(inside, (GROUP_COLUMNS, GROUP_COLUMNS)),
            _address(slope, (GROUP_COLUMNS, n)),
            n,
            _address(codes, (GROUP_COLUMNS, n), torch.uint8),
            _address(scales, (n,)),
            change.data_ptr(),
        )
    return change


def subtract_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Subtracts left^T right from `out` [64, n], for `left` [k, 64], `right` [k, n] and a few rows n.

    The rows of `left` may be parts of longer ones. k is a multiple of 4.
    """
    (k, columns), n = left.shape, out.shape[1]
    if k == 0:
        return
    if columns != GROUP_COLUMNS or k % 4 or left.dtype != torch.float32 or left.stride(1) != 1:
        raise ValueError(f"expected rows of 64 float32, a multiple of 4, got {left.dtype} {tuple(left.shape)}")
    with plugin_library() as library:
        library.agq_subtract_product(
            left.data_ptr(), left.stride(0), _address(right, (k, n)), k, n, _address(out, (GROUP_COLUMNS, n))
        )


@dataclass(frozen=True)
class GridBlock:
    """A block of up to 256 columns on a grid: a weight is step * code + offset, a code 0 to `most`."""

    steps: torch.Tensor  # [columns, n]
    offsets: torch.Tensor  # [columns, n]
    most: int

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [columns, n] stand for."""
        return codes * self.steps + self.offsets


def feed_back_on_grid(grid: GridBlock, upper: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`feed_back` with given scales: codes [columns, n] uint8 and (W - Q) / U_jj [columns, n]."""
    codes, errors = torch.empty(weights.shape, dtype=torch.uint8), torch.empty_like(weights)
    with plugin_library() as library:
        library.agq_feed_back_on_grid(
            *_grid(grid, weights.shape),
            _address(upper, (len(weights), len(weights))),
            _address(weights, weights.shape),
            codes.data_ptr(),
            errors.data_ptr(),
        )
    return codes, errors


def descend_on_grid(grid: GridBlock, inside: torch.Tensor, slope: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`descend` with given scales; improves `codes` [columns, n] in place, and returns the change of Q."""
    change = torch.empty_like(slope)
    with plugin_library() as library:
        library.agq_descend_on_grid(
            *_grid(grid, slope.shape),
            _address(inside, (len(slope), len(slope))),
            _address(slope, slope.shape),
            _address(codes, slope.shape, torch.uint8),
            change.data_ptr(),
        )
    return change


def _grid(grid: GridBlock, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The first arguments of both."""
    if shape[0] > _MOST_COLUMNS or not 0 < grid.most < 256:
        raise ValueError(f"expected up to {_MOST_COLUMNS} columns and codes of 8 bits, got {shape[0]} and {grid.most}")
    return *shape, _address(grid.steps, shape), _address(grid.offsets, shape), grid.most
