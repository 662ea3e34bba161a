"""Matrices in ggml's own types, made by the `gguf` package, or by ggml for the types that it makes better."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.format import stock_grids
from agq_gguf.gguf_io.reader import TYPE_IDS, TYPES

_BY_GGML = stock_grids.TYPE_NAMES  # `gguf` cannot write those with 256 columns, and does not weigh errors


def input_block(type_name: str) -> int:
    """How many channels of an input share a scale when ggml multiplies it with a matrix of a type."""
    return 256 if type_name.endswith("_K") else 32


def quantize(rows: NDArray[np.float32], type_name: str, importance: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """Converts rows [n, K] f32 to a type: uint8 [n, bytes per row]; for f16 and f32 [n, K] of that type.

    `importance` [K] holds mean squares of the input; only the types that ggml makes use it.
    """
    if type_name in _BY_GGML:
        from agq_gguf.runtime.ggml import ggml

        _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
        n_bytes = rows.shape[1] // block * block_bytes
        return ggml().quantize(TYPE_IDS[type_name], rows, n_bytes, importance)
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(rows, GGMLQuantizationType[type_name.upper()])


def restored(data: NDArray[Any], type_name: str) -> NDArray[np.float32]:
    """Rows in a type as float32 [n, K]."""
    from gguf import GGMLQuantizationType, quants

    found: NDArray[np.float32] = quants.dequantize(data, GGMLQuantizationType[type_name.upper()])
    return found.astype(np.float32, copy=False)


def rounded(
    rows: NDArray[np.float32], type_name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Rows [n, K] f32 after conversion to this type and back."""
    return restored(quantize(rows, type_name, importance), type_name)
