"""Attention quantized as in the paper, by the definition of docs/paper-attention.md, and a LLaMA forward with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from reference_model import Array, ReferenceModel

ZERO_CODE = 15  # of the 16 values of a 4-bit grid one is zero; codes 0 to 14 are powers of 1/2


def quantize(x: Array) -> tuple[NDArray[np.int8], Array]:
    """Codes in -127..127 of vectors in the last dimension, and the scale of each."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / np.where(scale == 0, 1, scale)).astype(np.int8), scale


def log2_grid(weights: Array) -> Array:
    """Softmax weights rounded to the nearest power of 1/2 (by exponent), or to zero below 2^-14.5."""
    with np.errstate(divide="ignore"):
        code = np.minimum(np.rint(-np.log2(weights)), ZERO_CODE)
    return np.where(code == ZERO_CODE, 0.0, 2.0**-code)


def paper_attention(q: Array, k: Array, v: Array, visible: NDArray[np.bool_], *, normalized: bool) -> Array:
    """Output [T, heads, size] of queries [T, heads, size] over keys and values [S, heads, size].

    `visible` is [T, S]; the scale of the scores is in the queries already.
    """
    (q_codes, q_scale), (k_codes, k_scale), (v_codes, v_scale) = quantize(q), quantize(k), quantize(v)
    products = np.einsum("thd,shd->hts", q_codes.astype(np.int32), k_codes.astype(np.int32))
    scores = products * q_scale[..., 0].T[:, :, None] * k_scale[..., 0].T[:, None, :]
    scores[:, ~visible] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = log2_grid(weights / weights.sum(-1, keepdims=True))
    if normalized:
        weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v_codes * v_scale)


class PaperAttentionReference(ReferenceModel):
    """A reference model whose attention is the paper's."""

    normalized = False

    def attention(self, x: Array, block: str) -> Array:
        tokens = len(x)
        q = self.rope(self.linear(x, f"{block}.attn_q.weight").reshape(tokens, self.n_head, -1))
        k = self.rope(self.linear(x, f"{block}.attn_k.weight").reshape(tokens, self.n_kv, -1))
        v = self.linear(x, f"{block}.attn_v.weight").reshape(tokens, self.n_kv, -1)
        k, v = (np.repeat(t, self.n_head // self.n_kv, axis=1) for t in (k, v))
        visible = np.tri(tokens, dtype=bool)
        mixed = paper_attention(q / np.sqrt(q.shape[-1]), k, v, visible, normalized=self.normalized)
        return self.linear(mixed.reshape(tokens, -1), f"{block}.attn_output.weight")
