"""An independent LLaMA forward in numpy that reads a GGUF file: what the running plugin must agree with.

AGQ4 weights go through ``blocks.matmul_reference`` (quantized activations, exact integers), all others are multiplied
in binary64. Nothing is shared with llama.cpp but the file.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from agq_gguf.format import blocks, reference

Array = NDArray[np.float64]


class ReferenceModel:
    """Weights and hyperparameters of a GGUF of architecture ``llama``, dense or a mixture of experts."""

    arch = "llama"

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.tensors = {t.name: t for t in reader.tensors}
        self.matrices = {t.name: t for t in reader.tensors if t.tensor_type == blocks.TYPE_ID}

        def value(key: str, default: float | None = None) -> float:
            field = reader.get_field(f"{self.arch}.{key}")
            if field is None:
                assert default is not None, key
                return default
            return float(field.contents())

        self.n_layer = int(value("block_count"))
        self.n_head = int(value("attention.head_count"))
        self.n_kv = int(value("attention.head_count_kv"))
        self.eps = value("attention.layer_norm_rms_epsilon")
        self.base = value("rope.freq_base", 10000.0)
        self.n_expert_used = int(value("expert_used_count", 0.0))
        self.sliding_window = int(value("attention.sliding_window", 0.0))
        self.window_pattern = int(value("attention.sliding_window_pattern", 1.0))

    def weight(self, name: str) -> Array:
        """Dequantized weights [M, K] of any type."""
        tensor = self.tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        """``x`` [T, K] times the transposed weight, [T, M], with quantized activations where the weight is AGQ4."""
        if name not in self.matrices:
            weight = self.weight(name)
            return x @ (weight if expert is None else weight[expert]).T
        data = self.matrices[name].data
        matrix = blocks.unpack(np.asarray(data if expert is None else data[expert]))
        return reference.matmul_reference(x.astype(np.float32), matrix).astype(np.float64)

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.weight(name)

    def rope(self, x: Array, positions: NDArray[np.int64] | None = None) -> Array:
        """Rotates neighbouring pairs of each head; ``x`` is [T, heads, head size], positions are 0.. if not given."""
        tokens, _, size = x.shape
        angle = (np.arange(tokens) if positions is None else positions)[:, None] * self.base ** (
            -np.arange(0, size, 2) / size
        )
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def window(self, layer: int) -> int:
        """How many positions a token sees in this layer, with its own; 0: all in front."""
        return 0

    def embed(self, tokens: list[int]) -> Array:
        embedding: Array = self.weight("token_embd.weight")[tokens]
        return embedding

    def project(self, x: Array, block: str, name: str, heads: int) -> Array:
        """Queries, keys or values [T, heads, head size] before they are turned."""
        return self.linear(x, f"{block}.attn_{name}.weight").reshape(len(x), heads, -1)

    def from_attention(self, mixed: Array, block: str) -> Array:
        """What the values that a layer's heads have mixed [T, heads * head size] add to the residual stream."""
        return self.linear(mixed, f"{block}.attn_output.weight")

    def feed_forward(self, x: Array, block: str) -> Array:
        """What a layer's feed-forward part adds to the residual stream."""
        return self.swiglu(self.norm(x, f"{block}.ffn_norm.weight"), block)

    def attention(self, x: Array, block: str) -> Array:
        tokens = len(x)
        q = self.rope(self.linear(x, f"{block}.attn_q.weight").reshape(tokens, self.n_head, -1))
        k = self.rope(self.linear(x, f"{block}.attn_k.weight").reshape(tokens, self.n_kv, -1))
        v = self.linear(x, f"{block}.attn_v.weight").reshape(tokens, self.n_kv, -1)
        k, v = (np.repeat(t, self.n_head // self.n_kv, axis=1) for t in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((tokens, tokens), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(tokens, -1)
        return self.linear(mixed, f"{block}.attn_output.weight")

    def swiglu(self, x: Array, block: str, suffix: str = "", expert: int | None = None) -> Array:
        gate = self.linear(x, f"{block}.ffn_gate{suffix}.weight", expert)
        up = self.linear(x, f"{block}.ffn_up{suffix}.weight", expert)
        return self.linear(gate / (1 + np.exp(-gate)) * up, f"{block}.ffn_down{suffix}.weight", expert)

    def experts(self, x: Array, block: str) -> Array:
        logits = x @ self.weight(f"{block}.ffn_gate_inp.weight").T
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, : self.n_expert_used]
        out = np.zeros_like(x)
        for t, row in enumerate(chosen):
            share = np.exp(logits[t, row] - logits[t, row].max())
            for weight, expert in zip(share / share.sum(), row, strict=True):
                out[t] += weight * self.swiglu(x[t : t + 1], block, "_exps", int(expert))[0]
        return out

    def logits(self, tokens: list[int]) -> Array:
        """Logits [T, vocabulary] of every position."""
        embedding = self.weight("token_embd.weight")
        x = embedding[tokens]
        for i in range(self.n_layer):
            block = f"blk.{i}"
            x = x + self.attention(self.norm(x, f"{block}.attn_norm.weight"), block)
            hidden = self.norm(x, f"{block}.ffn_norm.weight")
            x = x + (self.experts(hidden, block) if self.n_expert_used else self.swiglu(hidden, block))
        x = self.norm(x, "output_norm.weight")
        return self.linear(x, "output.weight" if "output.weight" in self.tensors else "token_embd.weight")
