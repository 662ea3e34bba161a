"""The compiled inner loops of rounding, for torch tensors; cpp/kernels/rounding.h defines what each computes.

Matrices of weights are transposed here, [64, n]: one group of columns of n rows. Calls release Python's lock, so other
threads can run.
"""

from __future__ import annotations

import torch

from agq_gguf.format.blocks import GROUP_COLUMNS
from agq_gguf.native import plugin_library


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
