"""An independent Gemma 3 forward in numpy: sliding windows in some layers, norms on both sides of each part."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from reference_model import Array, ReferenceModel


class WindowedModel(ReferenceModel):
    """A GGUF of architecture ``gemma3`` whose output is its embedding. The last of every few layers has no window."""

    arch = "gemma3"

    def window(self, layer: int) -> int:
        return 0 if layer % self.window_pattern == self.window_pattern - 1 else self.sliding_window

    def embed(self, tokens: list[int]) -> Array:
        embedding = super().embed(tokens)
        return embedding * math.sqrt(embedding.shape[1])

    def project(self, x: Array, block: str, name: str, heads: int) -> Array:
        projected = super().project(x, block, name, heads)
        return projected if name == "v" else self.norm(projected, f"{block}.attn_{name}_norm.weight")

    def rope(self, x: Array, positions: NDArray[np.int64] | None = None) -> Array:
        """Turns pairs of a channel of the first half of each head and one of the second."""
        half = x.shape[-1] // 2
        pairs = np.stack([x[..., :half], x[..., half:]], axis=-1).reshape(x.shape)
        turned = super().rope(pairs, positions)
        return np.concatenate([turned[..., 0::2], turned[..., 1::2]], axis=-1)

    def from_attention(self, mixed: Array, block: str) -> Array:
        return self.norm(super().from_attention(mixed, block), f"{block}.post_attention_norm.weight")

    def feed_forward(self, x: Array, block: str) -> Array:
        hidden = self.norm(x, f"{block}.ffn_norm.weight")
        gate, up = (self.linear(hidden, f"{block}.ffn_{name}.weight") for name in ("gate", "up"))
        bent = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return self.norm(self.linear(bent * up, f"{block}.ffn_down.weight"), f"{block}.post_ffw_norm.weight")
