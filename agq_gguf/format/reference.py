"""Reference implementation of AGQ4 (dequantize, quantize activations, multiply): slow but easy to read."""

from __future__ import annotations

from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from agq_gguf.format.blocks import GROUP_COLUMNS, Matrix, Parameters, channel_order

_Float = TypeVar("_Float", bound=np.floating)


_TINY = np.float32(2.0**-100)  # tokens with a smaller maximum count as zero


def rotate(x: NDArray[_Float]) -> NDArray[_Float]:
    """Multiplies groups of 64 columns of x [..., K] by the 64 x 64 Hadamard matrix over 8, which is its own inverse.

    It spreads the outlier of a channel over all 64 channels. The largest value is then closer to the others, so
    rounding with one scale loses less (QuaRot, arXiv 2404.00456). Each sum and difference is rounded, neighbours first,
    so the result has the same bits on every machine.
    """
    columns = x.shape[-1]
    found = x * x.dtype.type(0.125)  # scaled first, so that finite values rarely overflow
    for half in (1, 2, 4, 8, 16, 32):
        pairs = found.reshape(*x.shape[:-1], columns // (2 * half), 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        found = np.stack([first + second, first - second], axis=-2)
    return cast("NDArray[_Float]", found.reshape(x.shape))


def dequantize(matrix: Matrix) -> NDArray[np.float32]:
    """Weights [M, K] f32 with columns in input-channel order.

    D * 2^-e * code is exact in binary32. So without rotation each weight is rounded only once, in the product with the
    tensor scale.
    """
    parameters = matrix.parameters
    rows, columns = matrix.codes.shape
    values = (parameters.codebook.astype(np.float32) - 64)[matrix.codes]
    grouped = values.reshape(rows, -1, GROUP_COLUMNS)
    grouped *= np.ldexp(matrix.scales, -parameters.exponents.astype(np.int32))[..., None]
    if parameters.rotated:
        grouped = rotate(grouped)
        values = grouped.reshape(rows, columns)
    with np.errstate(over="ignore"):  # a damaged tensor scale may be huge; the weights are then infinite
        grouped *= np.float32(parameters.tensor_scale)
    if not parameters.listed.size:
        return values
    out = np.empty_like(values)
    out[:, channel_order(parameters.listed, columns)] = values
    return out


def quantize_activations(
    x: NDArray[np.float32], parameters: Parameters
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantizes activations [T, K] f32 as the runtime does.

    Returns xq int8 [T, K] in stored order, and s f32 [T, 1] or, with `per_group`, [T, K / 64]. A token that holds a NaN
    or an infinity, before or after rotation, gets zeros in xq and NaN in s.
    """
    tokens, columns = x.shape
    limit = np.float32(127 if parameters.activation_bits == 8 else 7)
    bad = np.logical_not(np.isfinite(x).all(axis=1, keepdims=True))[:, 0]
    stored = np.where(bad[:, None], np.float32(0), x)[:, channel_order(parameters.listed, columns)]
    refined = np.ldexp(stored.reshape(tokens, -1, GROUP_COLUMNS), -parameters.exponents.astype(np.int32)[:, None])
    if parameters.rotated:
        with np.errstate(over="ignore", invalid="ignore"):
            refined = rotate(refined)
        bad |= ~np.isfinite(refined).all(axis=(1, 2))
        refined[bad] = 0
    amax = np.abs(refined).max(axis=2)  # [T, K / 64]
    if not parameters.per_group:
        amax = amax.max(axis=1, keepdims=True)
    live = amax >= _TINY
    s = np.where(live, amax / limit, np.float32(0))
    factor = np.where(live, limit / np.where(live, amax, np.float32(1)), np.float32(0))
    xq = np.clip(np.rint(refined * factor[..., None]), -limit, limit).astype(np.int8)
    s[bad] = np.nan
    return xq.reshape(tokens, columns), s


def matmul_reference(x: NDArray[np.float32], matrix: Matrix) -> NDArray[np.float32]:
    """Product y [T, M] f32 of activations x [T, K] f32 with an AGQ4 matrix, as the runtime defines it.

    The sums inside a group are exact integers. The rest is computed in binary64 and rounded once, so a kernel may
    differ by the rounding of its sum over groups.
    """
    xq, s = quantize_activations(x, matrix.parameters)
    tokens, rows = len(x), len(matrix.codes)
    values = (matrix.parameters.codebook.astype(np.int32) - 64)[matrix.codes]
    # Exact: |u - 64| * 127 * 64 columns is far below 2^53.
    left = xq.reshape(tokens, -1, GROUP_COLUMNS).transpose(1, 0, 2).astype(np.float64)
    right = values.reshape(rows, -1, GROUP_COLUMNS).transpose(1, 2, 0).astype(np.float64)
    integers = left @ right  # [K / 64, T, M]
    scaled = integers * matrix.scales.T.astype(np.float64)[:, None, :] * s.T.astype(np.float64)[:, :, None]
    with np.errstate(over="ignore"):
        return (scaled.sum(axis=0) * np.float64(np.float32(matrix.parameters.tensor_scale))).astype(np.float32)
