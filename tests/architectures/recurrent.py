"""Decoders with layers that keep a state instead of a cache, or beside one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from architectures.parts import (
    EXPERT_FF,
    FF,
    HEAD,
    KV,
    LAYER_NORM,
    VOCAB,
    E,
    Keys,
    Layered,
    expert_counts,
    rms,
)


def write_mamba(path: Path | str) -> Path:
    """Mamba: recurrent, no attention; of its matrices, ssm_x has 40 rows and ssm_dt 8 columns."""
    inner, state, rank = 2 * E, 16, 8
    sizes: Keys = {
        "ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank,
    }  # fmt: skip
    m = Layered(path, "mamba", sizes, rms(1e-5), ff=0, n_head=0, kv=0)
    for block in m.blocks:
        m.norm(block + "attn_norm", E)
        m.matrix(block + "ssm_in", 2 * inner, E)
        m.linear(block + "ssm_conv1d", inner, 4)
        m.matrix(block + "ssm_x", rank + 2 * state, inner, gain=0.5)
        m.linear(block + "ssm_dt", inner, rank)
        decay = -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        m.writer.add_tensor(block + "ssm_a", decay)
        m.writer.add_tensor(block + "ssm_d", np.ones(inner, np.float32))
        m.matrix(block + "ssm_out", E, inner)
    return m.ends()


def write_lfm2(path: Path | str) -> Path:
    """LFM2: one layer with a short convolution, one with attention."""
    keys: Keys = {"rope.freq_base": 10000.0, "shortconv.l_cache": 3}
    m = Layered(path, "lfm2", rms(1e-5), keys, kv=[0, KV], pre="lfm2")
    m.gated("blk.0.")
    m.norm("blk.0.attn_norm", E)
    m.values("blk.0.shortconv.conv.weight", E, 3, spread=0.6)
    m.matrix("blk.0.shortconv.in_proj", 3 * E, E)
    m.matrix("blk.0.shortconv.out_proj", E, E, gain=0.5)
    m.gated("blk.1.")
    m.attention("blk.1.", qk_norm=True)
    m.output("token_embd", VOCAB, E, quiet=m.quiet)
    m.norm("token_embd_norm", E, outliers=False)
    return m.finish()


def write_granitehybrid(path: Path | str) -> Path:
    """Granite 4: one Mamba 2 layer, one with attention, both with experts; scales for everything."""
    inner, state, steps = 2 * E, 32, 16
    keys: Keys = {
        "rope.dimension_count": HEAD, "ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state,
        "ssm.time_step_rank": steps, "ssm.group_count": 1, "residual_scale": 0.5, "embedding_scale": 2.0,
        "attention.scale": 0.17, "logit_scale": 2.0,
    }  # fmt: skip
    counts = expert_counts(expert_shared_feed_forward_length=EXPERT_FF)
    m = Layered(path, "granitehybrid", rms(1e-5), counts, keys, ff=EXPERT_FF, kv=[0, KV], pre="dbrx")
    channels = inner + 2 * state
    m.norm("blk.0.attn_norm", E)
    m.matrix("blk.0.ssm_in", inner + channels + steps, E)
    m.values("blk.0.ssm_conv1d.weight", channels, 4, spread=0.5)
    m.bias("blk.0.ssm_conv1d", channels)
    m.bias("blk.0.ssm_dt", steps)
    m.writer.add_tensor("blk.0.ssm_a", -np.arange(1, steps + 1, dtype=np.float32).reshape(steps, 1))
    m.writer.add_tensor("blk.0.ssm_d", np.ones((steps, 1), np.float32))
    m.values("blk.0.ssm_norm.weight", 1, inner, mean=1.0)
    m.matrix("blk.0.ssm_out", E, inner, gain=0.5)
    m.attention("blk.1.")
    for block in m.blocks:
        m.norm(block + "ffn_norm", E)
        m.experts(block, shared=True)
    return m.ends(tied=True)


def write_rwkv7(path: Path | str) -> Path:
    """RWKV 7: no attention; a state that each token updates, by a recurrence that PyTorch cannot differentiate."""
    head, rank = 64, 64
    ranks = {f"attention.{name}_lora_rank": rank for name in ("decay", "iclr", "value_residual_mix", "gate")}
    m = Layered(path, "rwkv7", LAYER_NORM, {"wkv.head_size": head}, ranks, ff=2 * FF, n_head=0, kv=0)
    m.norm("token_embd_norm", E, bias=True, outliers=False)
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.norm(block + "attn_norm_2", E, bias=True)
        for name, mean, spread in (("w0", 0, 0.3), ("a0", 0, 0.3), ("v0", 0, 0.3), ("k_k", 1, 0.1), ("k_a", 1, 0.1),
                                   ("r_k", 0, 0.1)):  # fmt: skip
            m.values(f"{block}time_mix_{name}.weight", E, mean=mean, spread=spread)
        for name in ("w", "a", "v", "g"):
            m.matrix(f"{block}time_mix_{name}1", rank, E)
            m.matrix(f"{block}time_mix_{name}2", E, rank)
        mixing = m.rng.uniform(0, 1, (6, 1, 1, E)).astype(np.float32)
        m.writer.add_tensor(block + "time_mix_lerp_fused.weight", mixing)
        for name in ("key", "value", "receptance"):
            m.matrix(f"{block}time_mix_{name}", E, E)
        m.norm(block + "time_mix_ln", E, bias=True, outliers=False)
        m.matrix(block + "time_mix_output", E, E, gain=0.5)
        m.values(block + "channel_mix_lerp_k.weight", E, spread=0.3)
        m.matrix(block + "channel_mix_key", 2 * FF, E, gain=0.7)
        m.matrix(block + "channel_mix_value", E, 2 * FF, gain=0.5)
    return m.ends(bias=True)
