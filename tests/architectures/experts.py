"""Decoders whose feed-forwards are experts, of which each token uses a few."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import tiny_models

from architectures.parts import (
    EXPERT_FF,
    EXPERTS,
    HEADS,
    LAYERS,
    ROPE,
    YARN,
    E,
    Keys,
    Layered,
    expert_counts,
    heads,
    rms,
)  # fmt: skip


def write_mixtral(path: Path | str) -> Path:
    """Mixtral: LLaMA with 4 experts, 2 of them used."""
    return tiny_models.write_llama(path, dtype="f32", n_expert=4, n_expert_used=2)


def write_qwen2moe(path: Path | str) -> Path:
    """Qwen2's mixture: a shared expert with a gate of its own."""
    m = Layered(path, "qwen2moe", rms(), ROPE, expert_counts(expert_shared_feed_forward_length=EXPERT_FF))
    for block in m.blocks:
        m.attention(block, bias=True)
        m.norm(block + "ffn_norm", E)
        m.experts(block, shared=True)
        m.values(block + "ffn_gate_inp_shexp.weight", E)
    return m.ends()


def write_qwen3moe(path: Path | str) -> Path:
    """Qwen3's mixture of experts: 5 experts, 3 of them used, with their own width."""
    m = Layered(path, "qwen3moe", heads(), rms(), expert_counts(5, 3), pre="qwen2")
    for block in m.blocks:
        m.attention(block, qk_norm=True)
        m.norm(block + "ffn_norm", E)
        m.experts(block, 5)
    return m.ends()


def _further_prediction(m: Layered, block: str) -> None:
    """What a block for multi-token prediction has beside an ordinary layer."""
    m.matrix(block + "nextn.eh_proj", E, 2 * E)
    m.norms(block, "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")


def write_deepseek2(path: Path | str, *, further: bool = False, groups: int = 0) -> Path:
    """DeepSeek V2/V3: latent attention (MLA), a dense first layer, shared experts; perhaps a block for MTP.

    With `groups`, experts are chosen from the best half of so many groups.
    """
    latent, rope, nope, value = 128, 32, 96, 64
    lengths: Keys = {
        "kv_lora_rank": latent, "q_lora_rank": 128, "key_length": latent + rope, "value_length": latent,
        "key_length_mla": nope + rope, "value_length_mla": value,
    }  # fmt: skip
    keys: Keys = {
        "rope.freq_base": 10000.0, "rope.dimension_count": rope, "expert_weights_scale": 2.0,
        "expert_weights_norm": True, **{f"attention.{key}": length for key, length in lengths.items()},
        **({"nextn_predict_layers": 1} if further else {}),
        **({"expert_group_count": groups, "expert_group_used_count": groups // 2} if groups else {}),
    }  # fmt: skip
    counts = expert_counts(expert_shared_count=1, leading_dense_block_count=1, expert_gating_func=2)
    m = Layered(path, "deepseek2", rms(), counts, keys, kv=1, layers=LAYERS + further)
    for i, block in enumerate(m.blocks):
        m.norm(block + "attn_norm", E)
        m.norm(block + "attn_kv_a_norm", latent, outliers=False)
        m.norm(block + "attn_q_a_norm", 128, outliers=False)
        m.matrix(block + "attn_q_a", 128, E, gain=0.5)
        m.matrix(block + "attn_q_b", HEADS * (nope + rope), 128)
        m.matrix(block + "attn_kv_a_mqa", latent + rope, E, gain=0.5)
        m.matrix(block + "attn_k_b", HEADS, latent, nope)
        m.matrix(block + "attn_v_b", HEADS, value, latent)
        m.matrix(block + "attn_output", E, HEADS * value, gain=0.5)
        if i == 0:
            m.gated(block)
        else:
            m.norm(block + "ffn_norm", E)
            m.experts(block, shared=True)
            m.values(block + "exp_probs_b.bias", EXPERTS)
        if i >= LAYERS:
            _further_prediction(m, block)
    return m.ends()


def write_glm4moe(path: Path | str, *, further: bool = True) -> Path:
    """GLM-4.5: a dense first layer, shared experts, and a block for multi-token prediction."""
    keys: Keys = {
        "expert_weights_scale": 1.0, "expert_weights_norm": True, **({"nextn_predict_layers": 1} if further else {}),
    }  # fmt: skip
    counts = expert_counts(expert_shared_count=1, leading_dense_block_count=1)
    m = Layered(path, "glm4moe", heads(), rms(1e-5), counts, keys, layers=LAYERS + further, pre="glm4")
    for i, block in enumerate(m.blocks):
        m.attention(block, qk_norm=True)
        m.norm(block + "post_attention_norm", E)
        if i == 0:
            m.feed_forward(block)
        else:
            m.experts(block, shared=True)
            m.values(block + "exp_probs_b.bias", EXPERTS)
        if i >= LAYERS:
            _further_prediction(m, block)
    return m.ends()


def write_gpt_oss(
    path: Path | str,
    *,
    mxfp4: bool = False,
    unused: int | None = None,
    yarn: bool = False,
    layers: int = LAYERS,
    window: int = 16,
) -> Path:
    """gpt-oss: sinks, biases everywhere, every second layer with a sliding window; experts perhaps in MXFP4.

    No token chooses the expert `unused`.
    """
    head = 64
    keys: Keys = {"attention.sliding_window": window}
    m = Layered(
        path,
        "gpt-oss",
        heads(head),
        YARN if yarn else {},
        rms(1e-5),
        keys,
        expert_counts(),
        layers=layers,
        pre="gpt-4o",
    )
    for block in m.blocks:
        m.norm(block + "attn_norm", E)
        m.norm(block + "post_attention_norm", E)
        m.qkv(block, head=head, bias=True, out_bias=True)
        m.values(block + "attn_sinks.weight", HEADS, mean=1.0, spread=1.0)
        m.matrix(block + "ffn_gate_inp", EXPERTS, E)
        chances = m.rng.normal(0, 0.1, EXPERTS).astype(np.float32)
        if unused is not None:
            chances[unused] = -1e4
        m.writer.add_tensor(block + "ffn_gate_inp.bias", chances)
        for name, rows, columns in (("gate", EXPERT_FF, E), ("up", EXPERT_FF, E), ("down", E, EXPERT_FF)):
            tensor = f"{block}ffn_{name}_exps"
            if mxfp4:
                weight = m.rng.standard_normal((EXPERTS * rows, columns)).astype(np.float32) / np.sqrt(columns)
                kind = gguf.GGMLQuantizationType.MXFP4
                packed = gguf.quants.quantize(weight.astype(np.float32), kind).reshape(EXPERTS, rows, -1)
                m.writer.add_tensor(tensor + ".weight", packed, raw_dtype=kind)
            else:
                m.matrix(tensor, EXPERTS, rows, columns, gain=0.7)
            m.values(tensor + ".bias", EXPERTS, rows)
    return m.ends()


def write_llama4(path: Path | str, layers: int = 4) -> Path:
    """Llama 4: each fourth layer sees everything, the others chunks of 8192 tokens; a shared expert."""
    counts = expert_counts(used=1, interleave_moe_layer_step=2, expert_gating_func=2)
    m = Layered(path, "llama4", heads(), rms(), counts, layers=layers)
    for i, block in enumerate(m.blocks):
        m.attention(block)
        m.norm(block + "ffn_norm", E)
        if i % 2:
            m.experts(block, shared=True)
        else:
            m.feed_forward(block)
    return m.ends()


def write_grovemoe(path: Path | str) -> Path:
    """GroveMoE: experts, and chunks of experts that groups of them share."""
    counts = expert_counts(expert_chunk_feed_forward_length=EXPERT_FF, experts_per_group=2)
    m = Layered(path, "grovemoe", heads(), rms(), counts, {"expert_group_scale": 0.05}, pre="qwen2")
    for block in m.blocks:
        m.attention(block, qk_norm=True)
        m.norm(block + "ffn_norm", E)
        m.experts(block)
        m.matrix(block + "ffn_gate_chexps", 2, EXPERT_FF, E)
        m.matrix(block + "ffn_up_chexps", 2, EXPERT_FF, E, gain=0.5)
        m.matrix(block + "ffn_down_chexps", 2, E, EXPERT_FF, gain=0.5)
    return m.ends()
