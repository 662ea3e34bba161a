"""Mixed activations by the definition: a LLaMA forward in which some tokens of a call are quantized to 4 bits.

docs/mixed-activations.md once more, with nothing of the plugin: the attention of one layer tells how important tokens
are, and the least important share of them enters the products behind it (after attention, gate, up and down) in 4 bits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from reference_model import Array, ReferenceModel
from reference_pruning import RECENT_QUERIES, importance

from agq_gguf.format import blocks, reference


class MixedReference(ReferenceModel):
    """A reference model whose `four` says which rows of the products at hand have 4 bits."""

    four: NDArray[np.bool_] | None = None

    def linear(self, x: Array, name: str, expert: int | None = None) -> Array:
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if (
            self.four is None
            or part not in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")
            or len(x) != len(self.four)
        ):
            return super().linear(x, name, expert)
        matrix = blocks.unpack(np.asarray(self.matrices[name].data))
        out = np.empty((len(x), len(matrix.codes)))
        for bits, rows in ((8, ~self.four), (4, self.four)):
            if not rows.any():
                continue
            parameters = replace(matrix.parameters, activation_bits=bits)
            out[rows] = reference.matmul_reference(x[rows].astype(np.float32), replace(matrix, parameters=parameters))
        return out

    def last_logits(self, tokens: list[int], share: float, layer: int, score: str) -> Array:
        """Logits [vocabulary] of the last token of a prompt."""
        n = len(tokens)
        positions = np.arange(n)
        self.four = None
        x = self.weight("token_embd.weight")[tokens]
        for i in range(self.n_layer):
            block = f"blk.{i}"
            hidden = self.norm(x, f"{block}.attn_norm.weight")
            q = self.rope(self.linear(hidden, f"{block}.attn_q.weight").reshape(n, self.n_head, -1))
            k = self.rope(self.linear(hidden, f"{block}.attn_k.weight").reshape(n, self.n_kv, -1))
            v = self.linear(hidden, f"{block}.attn_v.weight").reshape(n, self.n_kv, -1)
            k, v = (np.repeat(t, self.n_head // self.n_kv, axis=1) for t in (k, v))
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
            scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            if i == layer:
                candidates = (positions != 0) & (positions != n - 1)
                if score == "recent":
                    candidates &= positions < n - RECENT_QUERIES
                values = importance(weights, positions, positions, score)
                order = [t for t in np.argsort(values, kind="stable") if candidates[t]]
                self.four = np.isin(positions, order[: int(np.floor(share * n + 0.5))])
            mixed = np.einsum("hts,shd->thd", weights, v).reshape(n, -1)
            if i == self.n_layer - 1:  # the last layer goes on with the token whose logits are wanted, in 8 bits
                mixed, x = mixed[-1:], x[-1:]
            x = x + self.linear(mixed, f"{block}.attn_output.weight")
            x = x + self.swiglu(self.norm(x, f"{block}.ffn_norm.weight"), block)
        x = self.norm(x, "output_norm.weight")
        return self.linear(x, "output.weight" if "output.weight" in self.tensors else "token_embd.weight")[0]
