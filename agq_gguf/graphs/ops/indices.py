"""Operations with row numbers. Choices (which expert, which rows) have no gradient."""

from __future__ import annotations

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op, same_batch

CHOICES = ("ARGSORT", "TOP_K")  # operations that choose by size, such as the experts of a token


@op("GET_ROWS")
def get_rows(node: Node, memo: Memo, a: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of `a`, by number."""
    if a.shape[:3] == (1, 1, 1):
        return functional.embedding(ids[:, 0], a[0, 0, 0])
    a, ids = same_batch(a, ids[:, 0])  # ids [batch, ne3, ne2, n]
    return a.gather(3, ids[..., None].expand(*ids.shape, a.shape[-1]))


@op("ARGSORT")
def argsort(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Places of the values of each row in order of size."""
    return x.detach().argsort(dim=-1, descending=bool(node.i32(0)), stable=True)


@op("TOP_K")
def top_k(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Places of the largest values of each row."""
    return x.detach().topk(node.shape[-1], -1).indices
