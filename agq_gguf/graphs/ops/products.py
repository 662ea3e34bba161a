"""Matrix products, plain and with experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op


@op("MUL_MAT")
def multiply(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """b a^T; `a` [.., M, K] may be one matrix for several of `b` [.., n, K]."""
    if a.shape[:3] == (1, 1, 1):
        return functional.linear(b, a[0, 0, 0])
    batch, n3, n2, n, k = b.shape
    m3, m2 = a.shape[1:3]
    left = b.reshape(batch, m3, n3 // m3, m2, n2 // m2, n, k)
    right = a.reshape(len(a), m3, 1, m2, 1, a.shape[3], k)
    return (left @ right.transpose(-1, -2)).reshape(max(batch, len(a)), n3, n2, n, -1)


def _repeated(b: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """b [batch, 1, T, U or 1, K] with one row for each of ids [batch, 1, 1, T, U]."""
    used = ids.shape[-1]
    return b.expand(*b.shape[:3], used, b.shape[-1]) if b.shape[3] == 1 else b.repeat(1, 1, 1, used // b.shape[3], 1)


def by_expert(b: torch.Tensor, ids: torch.Tensor, product: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[batch, 1, T, U, M]; `product` gets an expert and its rows [n, K], and gives [n, M]."""
    rows, flat = _repeated(b, ids), ids.flatten()
    order = flat.argsort(stable=True)
    parts = rows.reshape(-1, rows.shape[-1])[order].split(torch.bincount(flat).tolist())
    made = [product(expert, part) for expert, part in enumerate(parts) if len(part)]
    return torch.cat(made)[order.argsort()].reshape(*rows.shape[:4], -1)


@op("MUL_MAT_ID")
def multiply_experts(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Each row of b times the matrix of its expert; `a` [1, 1, experts, M, K]."""
    return by_expert(b, ids, lambda expert, rows: functional.linear(rows, a[0, 0, expert]))


@op("ADD_ID")
def add_of_expert(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of `a` plus the bias of their expert."""
    return a + b[0, 0, 0][ids[:, 0, 0]][:, None]


@op("OUT_PROD")
def outer_product(node: Node, memo: Memo, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """b^T a"""
    times = [b.shape[i] // a.shape[i] for i in (1, 2)]
    return b.transpose(-1, -2) @ a.repeat_interleave(times[0], 1).repeat_interleave(times[1], 2)
