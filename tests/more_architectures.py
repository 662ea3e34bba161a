"""Tiny GGUF models with random weights, without tokenizers, of architectures that `tiny_architectures` lacks.

They show that graphs of every kind run in PyTorch: other norms, caps, scales, positions, experts and attention.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import _Model, _sizes

E, FF, HEADS, KV, HEAD, VOCAB, EXPERTS = 128, 256, 4, 2, 32, 512, 6

RMS: dict[str, Any] = {"attention.layer_norm_rms_epsilon": 1e-6}
LAYER_NORM: dict[str, Any] = {"attention.layer_norm_epsilon": 1e-5}
ROPE: dict[str, Any] = {"rope.freq_base": 10000.0, "rope.dimension_count": HEAD}
HALF: dict[str, Any] = {"rope.dimension_count": HEAD // 2}  # half of each head is turned
YARN: dict[str, Any] = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
}  # fmt: skip
SIZES: dict[str, Any] = {"attention.key_length": HEAD, "attention.value_length": HEAD}


class _Tiny(_Model):
    """A model of some layers, with metadata under the name of its architecture."""

    def __init__(self, path: Path, arch: str, layers: int = 2, kv: int = KV, **keys: Any):
        super().__init__(path, arch, "f32", 1)
        _sizes(self, layers, E, FF, HEADS, kv, 512)
        self.layers, self.kv = layers, kv
        self.writer.add_string("tokenizer.ggml.model", "no_vocab")
        self.writer.add_vocab_size(VOCAB)
        for key, value in keys.items():
            self._add(f"{arch}.{key}", value)

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

    def values(self, name: str, *shape: int, size: float = 0.1, mean: float = 0.0) -> None:
        """A float32 tensor of random values."""
        self.writer.add_tensor(name, self.rng.normal(mean, size, shape).astype(np.float32))

    def qkv(self, block: str, *, bias: bool = False, out_bias: bool = False) -> None:
        """Attention's four matrices."""
        for name, rows in (("q", E), ("k", self.kv * HEAD), ("v", self.kv * HEAD), ("output", E)):
            self.matrix(f"{block}attn_{name}", rows, E, gain=0.7)
            if out_bias if name == "output" else bias:
                self.bias(f"{block}attn_{name}", rows)

    def gated(self, block: str, suffix: str = "", width: int = FF) -> None:
        """A feed-forward with a gate."""
        self.matrix(f"{block}ffn_gate{suffix}", width, E, gain=0.7)
        self.matrix(f"{block}ffn_up{suffix}", width, E, gain=0.7)
        self.matrix(f"{block}ffn_down{suffix}", E, width, gain=0.7)

    def plain(self, block: str) -> None:
        """A feed-forward without a gate, with biases."""
        self.linear(f"{block}ffn_up", FF, E, gain=0.7)
        self.linear(f"{block}ffn_down", E, FF, gain=0.7)

    def experts(self, block: str, *, bias: bool = False) -> None:
        """A router and experts with a gate."""
        self.matrix(f"{block}ffn_gate_inp", EXPERTS, E)
        for name, rows, columns in (("gate", 64, E), ("up", 64, E), ("down", E, 64)):
            self.matrix(f"{block}ffn_{name}_exps", EXPERTS, rows, columns, gain=0.7)
            if bias:
                self.values(f"{block}ffn_{name}_exps.bias", EXPERTS, rows)
        if bias:
            self.bias(f"{block}ffn_gate_inp", EXPERTS)

    def norms(self, block: str, *names: str, size: int = E, bias: bool = False) -> None:
        """Norms of one size."""
        for name in names:
            self.norm(block + name, size, bias=bias, outliers=False)

    def ends(self, *, bias: bool = False, tied: bool = False, out_bias: bool = False) -> Path:
        """Embedding, last norm and output; writes the file."""
        self.embedding("token_embd", VOCAB, E)
        self.norm("output_norm", E, bias=bias, outliers=False)
        if not tied:
            self.matrix("output", VOCAB, E, gain=2.0)
        if out_bias:
            self.bias("output", VOCAB)
        return self.finish()

    @property
    def blocks(self) -> list[str]:
        """Beginnings of the names of each layer's tensors."""
        return [f"blk.{i}." for i in range(self.layers)]


def _gated_model(path: Path, arch: str, *, tied: bool = False, layers: int = 2, **keys: Any) -> Path:
    """LLaMA's tensors, under other rules."""
    m = _Tiny(path, arch, layers, **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm")
        m.qkv(block)
        m.gated(block)
    return m.ends(tied=tied)


def write_gemma(path: Path) -> Path:
    """Gemma: GeGLU, scaled embedding."""
    return _gated_model(path, "gemma", tied=True, **RMS, **ROPE, **SIZES)


def write_granite(path: Path) -> Path:
    """Granite: scales of embedding, attention, residuals and logits."""
    scales: dict[str, Any] = {"logit_scale": 4.0, "residual_scale": 0.3, "embedding_scale": 3.0, "attention.scale": 0.1}
    return _gated_model(path, "granite", tied=True, **RMS, **ROPE, **scales)


def write_smollm3(path: Path) -> Path:
    """SmolLM3: each fourth layer without positions."""
    return _gated_model(path, "smollm3", tied=True, layers=4, **RMS, **ROPE)


def write_llama31(path: Path) -> Path:
    """LLaMA 3.1: a tensor of frequency factors."""
    m = _Tiny(path, "llama", **RMS, **ROPE)
    m.writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, HEAD // 2).astype(np.float32))
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm")
        m.qkv(block)
        m.gated(block)
    return m.ends()


def write_yarn(path: Path) -> Path:
    """LLaMA with YaRN positions."""
    return _gated_model(path, "llama", **RMS, **ROPE, **YARN)


def write_qwen2vl(path: Path) -> Path:
    """Qwen2-VL: positions in sections."""
    sections: dict[str, Any] = {"rope.dimension_sections": [4, 6, 6, 0]}
    m = _Tiny(path, "qwen2vl", **RMS, **ROPE, **sections)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm")
        m.qkv(block, bias=True)
        m.gated(block)
    return m.ends()


def write_stablelm(path: Path) -> Path:
    """StableLM: LayerNorm, half of each head turned."""
    keys: dict[str, Any] = {**LAYER_NORM, **HALF, "use_parallel_residual": False}
    m = _Tiny(path, "stablelm", **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm", bias=True)
        m.qkv(block)
        m.gated(block)
    return m.ends(bias=True)


def write_phi2(path: Path) -> Path:
    """Phi-2: attention and feed-forward side by side on one norm, biases everywhere."""
    m = _Tiny(path, "phi2", kv=HEADS, **LAYER_NORM, **HALF)
    for block in m.blocks:
        m.norms(block, "attn_norm", bias=True)
        m.qkv(block, bias=True, out_bias=True)
        m.plain(block)
    return m.ends(bias=True, out_bias=True)


def write_gptneox(path: Path) -> Path:
    """GPT-NeoX: attention and feed-forward side by side on two norms, fused qkv."""
    keys: dict[str, Any] = {**LAYER_NORM, **HALF, "use_parallel_residual": True}
    m = _Tiny(path, "gptneox", kv=HEADS, **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm", bias=True)
        m.linear(block + "attn_qkv", 3 * E, E, gain=0.7)
        m.linear(block + "attn_output", E, E, gain=0.7)
        m.plain(block)
    return m.ends(bias=True)


def write_nemotron(path: Path) -> Path:
    """Nemotron: squared ReLU."""
    m = _Tiny(path, "nemotron", **LAYER_NORM, **HALF)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm", bias=True)
        m.qkv(block)
        m.matrix(block + "ffn_up", FF, E, gain=0.7)
        m.matrix(block + "ffn_down", E, FF, gain=0.7)
    return m.ends(bias=True)


def write_olmo2(path: Path) -> Path:
    """OLMo 2: norms behind the parts, and over all heads of queries and keys."""
    m = _Tiny(path, "olmo2", **RMS, **ROPE)
    for block in m.blocks:
        m.qkv(block)
        m.gated(block)
        m.norms(block, "attn_q_norm")
        m.norms(block, "attn_k_norm", size=KV * HEAD)
        m.norms(block, "post_attention_norm", "post_ffw_norm")
    return m.ends()


def write_cohere2(path: Path, *, window: int = 16) -> Path:
    """Command R7B: parallel blocks, sliding windows, scaled logits."""
    keys: dict[str, Any] = {**LAYER_NORM, **ROPE, "attention.sliding_window": window, "logit_scale": 0.25}
    m = _Tiny(path, "cohere2", layers=4, **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm")
        m.qkv(block)
        m.gated(block)
    return m.ends(tied=True)


def write_glm4(path: Path) -> Path:
    """GLM-4: four norms, gate and up in one matrix, half of each head turned."""
    keys: dict[str, Any] = {**RMS, **ROPE, **HALF}
    m = _Tiny(path, "glm4", **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
        m.qkv(block, bias=True)
        m.matrix(block + "ffn_up", 2 * FF, E, gain=0.7)
        m.matrix(block + "ffn_down", E, FF, gain=0.7)
    return m.ends()


def write_qwen2moe(path: Path) -> Path:
    """Qwen2's mixture: a shared expert with a gate of its own."""
    sizes: dict[str, Any] = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 64}
    m = _Tiny(path, "qwen2moe", **RMS, **ROPE, **sizes, expert_shared_feed_forward_length=128)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm")
        m.qkv(block, bias=True)
        m.experts(block)
        m.gated(block, "_shexp", 128)
        m.values(block + "ffn_gate_inp_shexp.weight", E)
    return m.ends()


def write_llama4(path: Path) -> Path:
    """Llama 4: each fourth layer sees everything, the others chunks of 8192 tokens; a shared expert."""
    keys: dict[str, Any] = {
        **RMS, **ROPE, **SIZES, "expert_count": EXPERTS, "expert_used_count": 1, "expert_feed_forward_length": 64,
        "interleave_moe_layer_step": 2, "expert_gating_func": 2,
    }  # fmt: skip
    m = _Tiny(path, "llama4", 4, **keys)
    for i, block in enumerate(m.blocks):
        m.norms(block, "attn_norm", "ffn_norm")
        m.qkv(block)
        if i % 2:
            m.experts(block)
            m.gated(block, "_shexp", 64)
        else:
            m.gated(block)
    return m.ends()


def write_gpt_oss(path: Path, *, layers: int = 2, window: int = 16) -> Path:
    """gpt-oss: sinks, experts with biases and a clamped gate, sliding windows, YaRN."""
    keys: dict[str, Any] = {
        **RMS, **ROPE, **SIZES, **YARN, "attention.sliding_window": window, "expert_count": EXPERTS,
        "expert_used_count": 2, "expert_feed_forward_length": 64,
    }  # fmt: skip
    m = _Tiny(path, "gpt-oss", layers, **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm", "post_attention_norm")
        m.qkv(block, bias=True, out_bias=True)
        m.values(block + "attn_sinks.weight", HEADS, size=1.0)
        m.experts(block, bias=True)
    return m.ends()


def write_deepseek2(path: Path) -> Path:
    """DeepSeek-V2/V3: low-rank keys and values, a dense layer, then experts with a bias on the choice."""
    keys: dict[str, Any] = {
        **RMS, "rope.freq_base": 10000.0, "rope.dimension_count": 16, "attention.q_lora_rank": 48,
        "attention.kv_lora_rank": 64, "attention.key_length": 80, "attention.value_length": 64,
        "attention.key_length_mla": 48, "attention.value_length_mla": 32, "leading_dense_block_count": 1,
        "expert_feed_forward_length": 64, "expert_count": EXPERTS, "expert_used_count": 2, "expert_shared_count": 1,
        "expert_weights_scale": 1.5, "expert_weights_norm": True, "expert_gating_func": 2,
    }  # fmt: skip
    m = _Tiny(path, "deepseek2", kv=1, **keys)
    for block in m.blocks:
        m.norms(block, "attn_norm", "ffn_norm")
        m.norms(block, "attn_q_a_norm", size=48)
        m.norms(block, "attn_kv_a_norm", size=64)
        for name, shape in (("q_a", (48, E)), ("q_b", (HEADS * 48, 48)), ("kv_a_mqa", (80, E)),
                            ("k_b", (HEADS, 64, 32)), ("v_b", (HEADS, 32, 64)), ("output", (E, E))):  # fmt: skip
            m.matrix(f"{block}attn_{name}", *shape, gain=0.7)
        if block == "blk.0.":
            m.gated(block)
        else:
            m.experts(block)
            m.gated(block, "_shexp", 64)
            m.bias(block + "exp_probs_b", EXPERTS)
    return m.ends()


def write_rwkv7(path: Path) -> Path:
    """RWKV-7: a recurrence that PyTorch cannot differentiate here."""
    rank, size = 64, 64
    ranks = {f"attention.{key}_lora_rank": rank for key in ("decay", "iclr", "value_residual_mix", "gate")}
    m = _Model(path, "rwkv7", "f32", 0)
    w = m.writer
    _sizes(m, 2, E, 2 * FF, 0, 0, 512)
    w.add_string("tokenizer.ggml.model", "no_vocab")
    w.add_vocab_size(VOCAB)
    w.add_layer_norm_eps(1e-5)
    for key, value in {"wkv.head_size": size, **ranks}.items():
        w.add_uint32(f"rwkv7.{key}", value)
    m.norm("token_embd_norm", E, bias=True, outliers=False)
    for i in range(2):
        block = f"blk.{i}."
        m.norm(block + "attn_norm", E, bias=True, outliers=False)
        m.norm(block + "attn_norm_2", E, bias=True, outliers=False)
        for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k"):
            w.add_tensor(f"{block}time_mix_{name}.weight", m.rng.normal(0, 0.3, E).astype(np.float32))
        for name in "wavg":
            m.matrix(f"{block}time_mix_{name}1", rank, E)
            m.matrix(f"{block}time_mix_{name}2", E, rank)
        w.add_tensor(block + "time_mix_lerp_fused.weight", m.rng.uniform(0, 1, (6, 1, 1, E)).astype(np.float32))
        for name in ("key", "value", "receptance", "output"):
            m.matrix(f"{block}time_mix_{name}", E, E, gain=0.5)
        m.norm(block + "time_mix_ln", E, bias=True, outliers=False)
        w.add_tensor(block + "channel_mix_lerp_k.weight", m.rng.normal(0, 0.3, E).astype(np.float32))
        m.matrix(block + "channel_mix_key", 2 * FF, E, gain=0.7)
        m.matrix(block + "channel_mix_value", E, 2 * FF, gain=0.5)
    m.embedding("token_embd", VOCAB, E)
    m.matrix("output", VOCAB, E)
    m.norm("output_norm", E, bias=True, outliers=False)
    return m.finish()


WRITERS: dict[str, Callable[[Path], Path]] = {
    "gemma": write_gemma,
    "granite": write_granite,
    "smollm3": write_smollm3,
    "llama31": write_llama31,
    "yarn": write_yarn,
    "qwen2vl": write_qwen2vl,
    "stablelm": write_stablelm,
    "phi2": write_phi2,
    "gptneox": write_gptneox,
    "nemotron": write_nemotron,
    "olmo2": write_olmo2,
    "cohere2": write_cohere2,
    "glm4": write_glm4,
    "qwen2moe": write_qwen2moe,
    "gpt-oss": write_gpt_oss,
    "deepseek2": write_deepseek2,
}
