"""Operations that move values: shapes, windows, writes, repetitions."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op, same_batch
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.graphs.windows import Cut


@op("RESHAPE")
def reshape(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """The same values in another shape."""
    return x.reshape(x.shape[0], *node.shape)


@op("PERMUTE")
def permute(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Dimensions in another order."""
    return x.permute(0, *(axis + 1 for axis in node.attr))


@op("WINDOW")
def window(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """A part of the memory of x (`windows`)."""
    plan = node.attr
    flat = x.reshape(x.shape[0], -1)
    if not isinstance(plan, Cut):
        flat = flat.contiguous()
        strides = (flat.shape[1], *plan.strides)
        return flat.as_strided((len(flat), *plan.sizes), strides, int(flat.storage_offset()) + plan.offset)
    for trim, step, first, rows in plan.steps:
        flat = flat[..., :trim].unflatten(-1, (-1, step)).narrow(-2, first, rows)
    flat = flat.select(-1, plan.at)  # [batch, dimensions by falling stride]
    order = [1 + plan.axes.index(i) for i in (3, 2, 1, 0) if i in plan.axes]
    return flat.permute(0, *order).reshape(len(flat), *node.shape)


@op("FILL_ROWS")
def fill_rows(node: Node, memo: Memo, rows: torch.Tensor) -> torch.Tensor:
    """Rows, and rows of zeros behind them."""
    return functional.pad(rows, (0, 0, 0, node.shape[2] - rows.shape[3]))


@op("WRITE")
def write(node: Node, memo: Memo, base: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`base` with a part of its memory replaced by `value`."""
    strides, offset = node.attr
    base, value = same_batch(base, value)
    place = torch.full((1,), offset)
    for n, stride in zip(reversed(value.shape[1:]), strides, strict=True):
        place = (torch.arange(n)[:, None] * stride + place).flatten() if n > 1 else place
    written = base.reshape(len(base), -1).index_copy(1, place, value.reshape(len(base), -1))
    return written.reshape(len(base), *node.shape)


@op("SET_ROWS")
def set_rows(node: Node, memo: Memo, base: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`base` with rows replaced; `places` [batch, 1, c2, c1, n] are their numbers."""
    base, rows, where = same_batch(base, rows, places[:, 0])
    where = where.repeat(1, rows.shape[1] // where.shape[1], rows.shape[2] // where.shape[2], 1)
    return base.scatter(3, where[..., None].expand(rows.shape), rows)


@op("CONCAT")
def concat(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a and b, one behind the other."""
    return torch.cat(same_batch(a, b), 4 - node.i32(0))


@op("REPEAT")
def repeat(node: Node, memo: Memo, x: torch.Tensor, *_: Any) -> torch.Tensor:
    """x as often as it fits into the node's shape."""
    return x.repeat(1, *(n // m for n, m in zip(node.shape, x.shape[1:], strict=True)))


@op("PAD")
def pad(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Zeros at the ends of the dimensions."""
    if node.i32(8):
        raise Unsupported("its graph has PAD in a circle, which cannot be differentiated here")
    return functional.pad(x, [node.i32(i) for i in range(8)])
