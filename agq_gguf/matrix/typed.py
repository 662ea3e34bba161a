"""Makes matrices of the types whose codes are searched: AGQ4, and ggml's types of 5 and 6 bits."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats
from agq_gguf.format.blocks import TYPE_NAME
from agq_gguf.format.stock_grids import TYPE_NAMES as STOCK
from agq_gguf.matrix import quantize as agq4
from agq_gguf.matrix import stock_feedback
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import PreparedInput, QuantizedMatrix
from agq_gguf.matrix.stock_feedback import PreparedStock, QuantizedStock

SEARCHED = (TYPE_NAME, *STOCK)

Prepared = PreparedInput | PreparedStock
Quantized = QuantizedMatrix | QuantizedStock


def in_order(types: Collection[str]) -> list[str]:
    """The different types, AGQ4 last: what is prepared for it may take the Hessian's place in memory."""
    return sorted(set(types), key=lambda name: (name == TYPE_NAME, name))


def prepare(
    type_name: str, stats: InputStats | None, columns: int, capacity: int, options: MatrixOptions, *, consume: bool
) -> Prepared:
    """What all weights of a type with one input share; parameters as in `quantize.prepare_input`."""
    if type_name == TYPE_NAME:
        return agq4.prepare_input(stats, columns, capacity, options, consume=consume)
    return stock_feedback.prepare(stats, type_name, options)


def quantize(
    weight: NDArray[np.float32], prepared: Prepared, options: MatrixOptions, name: str, gram: torch.Tensor | None = None
) -> Quantized:
    """Quantizes one matrix; parameters and errors as in `quantize.quantize_matrix`."""
    if isinstance(prepared, PreparedInput):
        return agq4.quantize_matrix(weight, prepared, options, name, gram)
    return stock_feedback.quantize(weight, prepared, name, gram)
