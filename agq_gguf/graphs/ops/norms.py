"""Norms, without the weights that ggml multiplies and adds as operations of their own."""

from __future__ import annotations

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op


@op("RMS_NORM")
def rms_norm(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Rows with a root mean square of 1."""
    return functional.rms_norm(x, x.shape[-1:], None, node.f32(0))


@op("NORM")
def norm(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Rows with mean 0 and variance 1."""
    return functional.layer_norm(x, x.shape[-1:], None, None, node.f32(0))


@op("L2_NORM")
def l2_norm(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Rows with length 1."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=node.f32(0))


@op("GROUP_NORM")
def group_norm(node: Node, memo: Memo, x: torch.Tensor) -> torch.Tensor:
    """Groups of channels with mean 0 and variance 1."""
    batch, n3, n2, n1, n0 = x.shape
    flat = x.reshape(batch * n3, n2, n1 * n0)
    return functional.group_norm(flat, node.i32(0), None, None, node.f32(1)).reshape(x.shape)
