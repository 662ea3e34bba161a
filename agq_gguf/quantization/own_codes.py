"""Tensors whose own 4-bit integers become AGQ4's codes: finds them in a source, and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from agq_gguf.format.blocks import TYPE_NAME
from agq_gguf.gguf_io.reader import Reader, Tensor
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.own_codes import keep
from agq_gguf.matrix.quantize import QuantizedMatrix
from agq_gguf.quantization.type_plan import TensorPlan

_FIRST_ROWS = 4  # are looked at before a tensor is read whole


def marked(reader: Reader, plans: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The plans, with `own_codes` where a tensor is to be AGQ4 and is made of such integers."""
    return [
        replace(plan, own_codes=plan.searched and plan.type_name == TYPE_NAME and _has_integers(reader, plan.source))
        for plan in plans
    ]


def read(reader: Reader, tensor: Tensor, options: MatrixOptions) -> list[QuantizedMatrix]:
    """The matrices of a tensor that `marked` found: one, or one for each expert."""
    found = [made for made in _matrices(reader, tensor, options) if made is not None]
    assert len(found) == tensor.n_matrices  # the file cannot have changed since: `Reader.check_unchanged`
    return found


def _has_integers(reader: Reader, tensor: Tensor) -> bool:
    first = reader.read(tensor.name, range(min(_FIRST_ROWS, tensor.shape[-2])))
    options = MatrixOptions()
    return keep(first, options) is not None and None not in _matrices(reader, tensor, options)


def _matrices(reader: Reader, tensor: Tensor, options: MatrixOptions) -> Iterator[QuantizedMatrix | None]:
    rows = tensor.shape[-2]
    for begin in range(0, tensor.n_matrices * rows, rows):
        yield keep(reader.read(tensor.name, range(begin, begin + rows)), options)
