"""What tiny models of all architectures are made of: sizes, metadata, and the tensors of the usual layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

E, FF, HEADS, KV, HEAD, VOCAB, CONTEXT, LAYERS = 128, 256, 4, 2, 32, 512, 256, 2
EXPERTS, USED, EXPERT_FF = 4, 2, 128

# Metadata, by the part of the key behind the architecture's name.
Keys = Mapping[str, Any]
LAYER_NORM: Keys = {"attention.layer_norm_epsilon": 1e-5}
ROPE: Keys = {"rope.freq_base": 10000.0, "rope.dimension_count": HEAD}
HALF: Keys = {"rope.dimension_count": HEAD // 2}  # half of each head is turned
YARN: Keys = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
}  # fmt: skip
WINDOW: Keys = {"attention.sliding_window": 16}  # shorter than the tests' texts


def rms(epsilon: float = 1e-6) -> Keys:
    """RMS norms."""
    return {"attention.layer_norm_rms_epsilon": epsilon}


def heads(size: int = HEAD) -> Keys:
    """Heads of a size of their own, turned as a whole."""
    lengths = {"attention.key_length": size, "attention.value_length": size}
    return {**lengths, "rope.dimension_count": size, "rope.freq_base": 10000.0}


def expert_counts(count: int = EXPERTS, used: int = USED, width: int = EXPERT_FF, **more: Any) -> Keys:
    """How many experts there are, and how wide they are."""
    counts = {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": width}
    return {**counts, **more}


class Layered(tiny_models.TinyModel):
    """A model of some layers with embedding, output and tokenizer."""

    def __init__(
        self,
        path: Path | str,
        arch: str,
        *keys: Keys,
        pre: str = "gpt-2",
        layers: int = LAYERS,
        ff: int = FF,
        n_head: int = HEADS,
        kv: int | list[int] = KV,
        dtype: str = "f32",
        name: str = "",
    ):
        """`pre` names the tokenizer: "spm", or what cuts the text for BPE."""
        super().__init__(path, arch, dtype, 0, name)
        tiny_models.add_sizes(self, layers, E, ff, n_head, kv, CONTEXT)
        self.layers, self.kv = layers, kv if isinstance(kv, int) else max(kv)
        self.writer.add_vocab_size(VOCAB)
        for key, value in {key: value for each in keys for key, value in each.items()}.items():
            self._add(f"{arch}.{key}", value)
        if pre == "spm":
            self.quiet = tiny_models.add_spm_tokenizer(self.writer, VOCAB)
        else:
            self.quiet = tiny_models.add_bpe_tokenizer(self.writer, VOCAB, pre=pre)

    def _add(self, key: str, value: Any) -> None:
        writer = self.writer
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)

    @property
    def blocks(self) -> list[str]:
        """Beginnings of the names of each layer's tensors."""
        return [f"blk.{i}." for i in range(self.layers)]

    def values(self, name: str, *shape: int, mean: float = 0.0, spread: float = 0.1) -> None:
        """A float32 tensor of random values."""
        self.writer.add_tensor(name, self.rng.normal(mean, spread, shape).astype(np.float32))

    def norms(self, block: str, *names: str, size: int = E) -> None:
        """Norms without outliers."""
        for name in names:
            self.norm(block + name, size, outliers=False)

    def project(self, name: str, rows: int, columns: int, *, bias: bool, gain: float = 0.5) -> None:
        """A matrix, with a bias or without."""
        (self.linear if bias else self.matrix)(name, rows, columns, gain=gain)

    def qkv(self, block: str, *, head: int = HEAD, bias: bool = False, out_bias: bool = False) -> None:
        """Attention's four matrices."""
        for part, rows in (("q", HEADS), ("k", self.kv), ("v", self.kv)):
            self.project(f"{block}attn_{part}", rows * head, E, bias=bias)
        self.project(block + "attn_output", E, HEADS * head, bias=out_bias)

    def attention(self, block: str, *, head: int = HEAD, qk_norm: bool = False, bias: bool = False) -> None:
        """A norm and attention's four matrices."""
        self.norm(block + "attn_norm", E)
        self.qkv(block, head=head, bias=bias)
        if qk_norm:
            self.norms(block, "attn_q_norm", "attn_k_norm", size=head)

    def feed_forward(self, block: str, suffix: str = "", width: int = FF) -> None:
        """The three matrices of a feed-forward with a gate."""
        self.matrix(f"{block}ffn_gate{suffix}", width, E)
        self.matrix(f"{block}ffn_up{suffix}", width, E, gain=0.5)
        self.matrix(f"{block}ffn_down{suffix}", E, width, gain=0.5)

    def gated(self, block: str) -> None:
        """A norm and a feed-forward with a gate."""
        self.norm(block + "ffn_norm", E)
        self.feed_forward(block)

    def plain(self, block: str, *, bias: bool = True, gain: float = 1.0) -> None:
        """The two matrices of a feed-forward without a gate."""
        self.project(block + "ffn_up", FF, E, bias=bias, gain=gain)
        self.project(block + "ffn_down", E, FF, bias=bias)

    def experts(self, block: str, count: int = EXPERTS, *, shared: bool = False) -> None:
        """A router and experts with a gate; perhaps one that all tokens use."""
        self.matrix(block + "ffn_gate_inp", count, E)
        self.matrix(block + "ffn_gate_exps", count, EXPERT_FF, E)
        self.matrix(block + "ffn_up_exps", count, EXPERT_FF, E, gain=0.5)
        self.matrix(block + "ffn_down_exps", count, E, EXPERT_FF, gain=0.5)
        if shared:
            self.feed_forward(block, "_shexp", EXPERT_FF)

    def ends(self, *, tied: bool = False, bias: bool = False, out_bias: bool = False) -> Path:
        """Embedding, last norm and output, which may be one with the embedding; writes the file."""
        if tied:
            self.output("token_embd", VOCAB, E, quiet=self.quiet)
        else:
            self.embedding("token_embd", VOCAB, E)
            self.output("output", VOCAB, E, quiet=self.quiet)
        if out_bias:
            self.bias("output", VOCAB)
        self.norm("output_norm", E, bias=bias, outliers=False)
        return self.finish()
