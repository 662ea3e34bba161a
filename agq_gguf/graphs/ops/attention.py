"""Attention, in one operation and in parts."""

from __future__ import annotations

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op, repeated


@op("SOFT_MAX")
def soft_max(
    node: Node, memo: Memo, x: torch.Tensor, mask: torch.Tensor | None = None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax of scaled rows plus a mask."""
    x = x * node.f32(0)
    if mask is not None:
        mask = repeated(mask[..., : x.shape[3], :], x)
        x = x + (mask * slopes(x.shape[2], node.f32(1)) if node.f32(1) > 0 else mask)
    return _softmax(x, sinks)


@op("FLASH_ATTN_EXT")
def attention(
    node: Node,
    memo: Memo,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [batch, ne3, heads, tokens, channels] to k and v, with fewer heads; tokens before heads."""
    scale, bias, cap = (node.f32(i) for i in range(3))
    causal, seen = False, k.shape[3]
    if mask is not None:
        spelled = bool(cap) or sinks is not None
        key = ("mask", node.inputs[3], q.shape[2:4], bias, spelled)
        if key not in memo:
            memo[key] = _mask(mask, q, bias, spelled)
        causal, seen, mask = memo[key]
    k, v = k[..., :seen, :], v[..., :seen, :]
    repeat = q.shape[2] // k.shape[2]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    if cap or sinks is not None:
        scores = q @ k.transpose(-1, -2) * scale
        if cap:
            scores = cap * torch.tanh(scores / cap)
        return (_softmax(scores if mask is None else scores + mask, sinks) @ v).transpose(2, 3)
    batch = q.shape[:2]
    if mask is not None:
        mask = mask.expand(*batch, *mask.shape[2:]).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    found = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return found.unflatten(0, batch).transpose(2, 3)


@torch.no_grad()
def _mask(mask: torch.Tensor, q: torch.Tensor, bias: float, spelled: bool) -> tuple[bool, int, torch.Tensor | None]:
    """Whether a mask is plainly causal (and need not be `spelled` out), how many keys anybody sees, and their mask."""
    tokens = q.shape[3]
    mask = mask[..., :tokens, :]
    seen = int(torch.isfinite(mask).flatten(0, -2).any(0).nonzero().max()) + 1
    mask = mask[..., :seen]
    if bias > 0:
        return False, seen, mask * slopes(q.shape[2], bias)
    plain = torch.full((tokens, seen), -torch.inf).triu(1)
    causal = not spelled and seen == tokens and bool((mask == plain).all())
    return causal, seen, None if causal else mask


def slopes(heads: int, bias: float) -> torch.Tensor:
    """ALiBi's factor of the mask for each head (arXiv 2108.12409) [heads, 1, 1]."""
    whole = 1 << (heads.bit_length() - 1)  # the largest power of two
    first, second = 2.0 ** (-bias / whole), 2.0 ** (-bias / 2 / whole)
    found = [first ** (h + 1) if h < whole else second ** (2 * (h - whole) + 1) for h in range(heads)]
    return torch.tensor(found)[:, None, None]


def _softmax(x: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax; `sinks`, a score for each head, take their share and give nothing."""
    if sinks is None:
        return x.softmax(-1)
    extra = sinks.flatten()[:, None, None].expand(*x.shape[:-1], 1)
    return torch.cat([x, extra], -1).softmax(-1)[..., :-1]
