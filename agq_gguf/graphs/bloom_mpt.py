"""The graphs of BLOOM and MPT in PyTorch: `LlamaGraph` with other parts. OPT models are written as MPT.

Norms subtract the mean and mostly have a bias. One matrix produces queries, keys and values. The feed-forward has one
matrix before a GELU. Positions are added to the embedding or, as slopes (ALiBi, arXiv 2108.12409), to the scores.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch.nn import functional

from agq_gguf.gguf_io.reader import Reader
from agq_gguf.graphs.llama import LlamaGraph, why_not_causal

ARCHITECTURES = ("bloom", "mpt")
_BLOOM_ALIBI = 8.0  # llama.cpp has no key for it
_TENSORS = (
    r"blk\.\d+\.(attn_norm|ffn_norm|attn_qkv|attn_output|ffn_up|ffn_down)\.(weight|bias)|blk\.\d+\.ffn\.act\.scales"
    r"|token_embd\.weight|token_embd_norm\.(weight|bias)|position_embd\.weight|output_norm\.(weight|bias)"
    r"|output\.weight"
)


def why_not(reader: Reader) -> str:
    """Why this graph does not support a model of these architectures; empty if it does."""
    for name in reader.tensors:
        if not re.fullmatch(_TENSORS, name):
            return f"its tensor {name} is not supported"
    return why_not_causal(reader)


class GeluGraph(LlamaGraph):
    """A model that `why_not` finds supported."""

    stages = (("attn_qkv",), ("attn_output",), ("ffn_up",), ("ffn_down",))
    levelled = ()

    def __init__(self, reader: Reader, cache: int) -> None:
        super().__init__(reader, cache)
        arch = reader.architecture
        self.shape = replace(self.shape, eps=reader.number(f"{arch}.attention.layer_norm_epsilon", 1e-5))
        bias = _BLOOM_ALIBI if arch == "bloom" else reader.number(f"{arch}.attention.max_alibi_bias", 0.0)
        self._slopes = _slopes(self.shape.n_head, bias) if bias > 0 else None

    def enter(self, rows: torch.Tensor) -> torch.Tensor:
        """x from rows [batch, tokens, n_embd] of the embedding."""
        if self.has("position_embd.weight"):
            rows = rows + self.tensor("position_embd.weight")[: rows.shape[1]]
        return self._norm(rows, "token_embd_norm") if self.has("token_embd_norm.weight") else rows

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.tensor(f"{name}.bias") if self.has(f"{name}.bias") else None
        return functional.layer_norm(x, (x.shape[-1],), self.tensor(f"{name}.weight"), bias, self.shape.eps)

    def _activated(self, layer: int, *products: torch.Tensor) -> torch.Tensor:
        found, scales = functional.gelu(products[0], approximate="tanh"), f"blk.{layer}.ffn.act.scales"
        return found / self.tensor(scales) if self.has(scales) else found

    def _attention(self, layer: int, *products: torch.Tensor) -> torch.Tensor:
        shape, qkv = self.shape, products[0]
        batch, tokens, _ = qkv.shape
        sizes = [shape.n_head * shape.head, *[shape.n_kv * shape.head] * 2]
        q, k, v = (part.view(batch, tokens, -1, shape.head).transpose(1, 2) for part in qkv.split(sizes, -1))
        repeat = shape.n_head // shape.n_kv
        places = torch.arange(tokens)
        mask = torch.zeros(tokens, tokens).masked_fill_(places[None, :] > places[:, None], -torch.inf)
        if self._slopes is not None:
            mask = mask + self._slopes[:, None, None] * (places[None, :] - places[:, None])
        mixed = functional.scaled_dot_product_attention(
            q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), attn_mask=mask
        )
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)


def _slopes(heads: int, bias: float) -> torch.Tensor:
    """ALiBi's slope of each head, as in llama.cpp."""
    whole = 1 << (heads.bit_length() - 1)  # the largest power of two
    exponents = [
        bias * (h + 1) / whole if h < whole else bias / 2 * (2 * (h - whole) + 1) / whole for h in range(heads)
    ]
    return torch.tensor([2.0**-e for e in exponents])
