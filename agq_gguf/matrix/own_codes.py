"""Weights that are 4-bit integers times one scale per group already: AGQ4 keeps these integers as its codes.

Checkpoints of GPTQ, AWQ, AutoRound and compressed-tensors are such weights if they are symmetric and a scale belongs
to 64 columns or more; so are ternary weights (BitNet, arXiv 2402.17764). Only the scales are rounded, to 7 significant
bits. Groups stay unrotated, because rotated integers are no integers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.format.blocks import GROUP_COLUMNS, Matrix, Parameters, round_scale
from agq_gguf.format.reference import dequantize
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import ERROR_ROWS, QuantizedMatrix, tensor_scale_for

_STEP = 8  # of the codebook: code i stands for 8 (i - 8), which uses the whole range of its values
_CODEBOOK = np.arange(0, 128, _STEP, dtype=np.uint8)
_LARGEST = 8  # -8 to 7, or with a negative scale -7 to 8
# A weight may differ from its multiple of the scale by this share of itself. F16 and BF16 round by less, and 64 random
# weights never come as close.
_ROUNDED = 1 / 64
_ROWS_AT_A_TIME = 512


def keep(weight: NDArray[np.float32], options: MatrixOptions) -> QuantizedMatrix | None:
    """The AGQ4 matrix with the integers of `weight` [M, K] f32 as its codes; None if they are no such integers.

    Its error is that on white noise, measured on some of the rows. K must be a multiple of 64.
    """
    rows, columns = weight.shape
    codes, scales = np.empty((rows, columns), np.uint8), np.empty((rows, columns // GROUP_COLUMNS), np.float32)
    for begin in range(0, rows, _ROWS_AT_A_TIME):
        part = slice(begin, min(begin + _ROWS_AT_A_TIME, rows))
        found = _integers(torch.from_numpy(weight[part]).reshape(-1, GROUP_COLUMNS))
        if found is None:
            return None
        codes[part] = (found[0] + 8).to(torch.uint8).reshape(-1, columns).numpy()
        scales[part] = found[1].reshape(-1, scales.shape[1]).numpy()
    largest = float(np.abs(scales).max())
    if not largest:
        return None
    alpha = tensor_scale_for(_STEP * _LARGEST * largest)
    stored = round_scale((scales / np.float32(_STEP * alpha)).astype(np.float32))
    parameters = Parameters(
        codebook=_CODEBOOK,
        exponents=np.zeros(columns // GROUP_COLUMNS, np.uint8),
        tensor_scale=alpha,
        activation_bits=options.activation_bits,
        activation_scale="group" if options.rotated else options.activation_scale,
    )
    step = -(-rows // ERROR_ROWS)
    restored = dequantize(Matrix(codes[::step], stored[::step], parameters))
    return QuantizedMatrix(Matrix(codes, stored, parameters), _relative_error(weight[::step], restored))


def _integers(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Integers in -8..7 [n, 64] and scales [n] of groups [n, 64] f32; None if one of the groups has none."""
    largest = groups.abs().amax(1)
    if not torch.isfinite(largest).all():
        return None
    found, scales = torch.zeros_like(groups), torch.zeros_like(largest)
    missing = torch.arange(len(groups))[largest > 0]
    for most in range(_LARGEST, 0, -1):  # the integer of the largest weight
        left = groups[missing]
        scale = largest[missing] / most
        integers = (left / scale[:, None]).round()
        close = (left - integers * scale[:, None]).abs() <= _ROUNDED * left.abs()
        fits = close.all(1)
        positive = (integers == _LARGEST).any(1)
        fits &= ~(positive & (integers == -_LARGEST).any(1))
        sign = torch.where(positive, -1.0, 1.0)
        chosen, q = missing[fits], integers[fits]
        found[chosen] = q * sign[fits, None]
        scales[chosen] = (groups[chosen] * q).sum(1) / q.square().sum(1) * sign[fits]
        missing = missing[~fits]
    return None if len(missing) else (found, scales)


def _relative_error(weight: NDArray[np.float32], restored: NDArray[np.float32]) -> float:
    """Squared error over squared weights."""
    total = float(np.square(weight, dtype=np.float64).sum())
    return float(np.square(weight - restored, dtype=np.float64).sum()) / total if total else 0.0
