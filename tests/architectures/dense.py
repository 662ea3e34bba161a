"""Decoders whose layers are attention and one feed-forward."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import tiny_models

from architectures.parts import (
    CONTEXT,
    FF,
    HALF,
    HEAD,
    HEADS,
    KV,
    LAYER_NORM,
    LAYERS,
    ROPE,
    VOCAB,
    YARN,
    E,
    Keys,
    Layered,
    heads,
    rms,
)  # fmt: skip


def write_qwen3(path: Path | str, *, pooling: gguf.PoolingType | None = None) -> Path:
    """Qwen3: norms on queries and keys, heads that are wider than the model's share. Qwen3-Embedding has `pooling`."""
    m = Layered(path, "qwen3", heads(64), rms(), pre="qwen2")
    if pooling is not None:
        m.writer.add_pooling_type(pooling)
    for block in m.blocks:
        m.attention(block, head=64, qk_norm=True)
        m.gated(block)
    return m.ends()


def _write_gemma(path: Path | str, arch: str, *keys: Keys, tied: bool = True, layers: int, window: int) -> Path:
    windows: Keys = {"attention.sliding_window": window, "attention.sliding_window_pattern": 2}
    m = Layered(path, arch, heads(), rms(), windows, *keys, layers=layers, pre="spm")
    for block in m.blocks:
        m.attention(block, qk_norm=arch == "gemma3")
        m.gated(block)
        m.norms(block, "post_attention_norm", "post_ffw_norm")
    return m.ends(tied=tied)


def write_gemma2(path: Path | str, *, layers: int = LAYERS, window: int = 16, cap: float = 50.0) -> Path:
    """Gemma 2: soft caps, norms before and behind, each second layer with a sliding window, tied output."""
    caps: Keys = {"attn_logit_softcapping": cap, "final_logit_softcapping": 30.0}
    return _write_gemma(path, "gemma2", caps, layers=layers, window=window)


def write_gemma3(path: Path | str, *, tied: bool = True, layers: int = LAYERS, window: int = 16) -> Path:
    """Gemma 3: norms on queries and keys, every second layer with a sliding window, tied output."""
    return _write_gemma(path, "gemma3", tied=tied, layers=layers, window=window)


def _layer_embeddings(m: Layered, own: int) -> None:
    """An embedding of `own` channels for each layer."""
    m.embedding("per_layer_token_embd", VOCAB, own * m.layers)
    m.matrix("per_layer_model_proj", own * m.layers, E)
    m.norm("per_layer_proj_norm", own, outliers=False)


def write_gemma4(path: Path | str, *, layers: int = 4, shared: int = 2, window: int = 16, head: int = HEAD) -> Path:
    """Gemma 4: as Gemma 3n, but with one residual stream.

    Every second layer has a window. The last `shared` layers have no keys and values of their own.
    """
    own = 128
    keys: Keys = {
        "attention.key_length_swa": head, "attention.value_length_swa": head, "attention.sliding_window": window,
        "attention.sliding_window_pattern": [i % 2 == 0 for i in range(layers)], "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": own, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    m = Layered(path, "gemma4", heads(head), rms(), keys, layers=layers, pre="spm")
    m.writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, head // 2).astype(np.float32))
    _layer_embeddings(m, own)
    for i, block in enumerate(m.blocks):
        m.norm(block + "attn_norm", E)
        m.matrix(block + "attn_q", HEADS * head, E, gain=0.5)
        # There is no other scale of the scores.
        m.values(block + "attn_q_norm.weight", head, mean=head**-0.5, spread=0.02)
        if i < layers - shared:
            m.matrix(block + "attn_k", KV * head, E, gain=0.5)
            m.matrix(block + "attn_v", KV * head, E, gain=0.5)
            m.norms(block, "attn_k_norm", size=head)
        m.matrix(block + "attn_output", E, HEADS * head, gain=0.5)
        m.gated(block)
        m.norms(block, "post_attention_norm", "post_ffw_norm", "post_norm")
        m.matrix(block + "inp_gate", own, E)
        m.matrix(block + "proj", E, own)
        m.values(block + "layer_output_scale.weight", 1, mean=1.0)
    return m.ends(tied=True)


def write_gemma3n(path: Path | str, *, layers: int = LAYERS, window: int = 16) -> Path:
    """Gemma 3n: an embedding for each layer, alternating updates (AltUp), low-rank residuals (LAuReL).

    Layers from 20 on read the cache of layer 18 or, if they have no window, 19.
    """
    own, inputs = 256, 4
    keys: Keys = {
        "embedding_length_per_layer_input": own, "altup.active_idx": 0, "altup.num_inputs": inputs,
        "attention.shared_kv_layers": 0,
    }  # fmt: skip
    windows: Keys = {"attention.sliding_window": window}
    m = Layered(path, "gemma3n", heads(), rms(), windows, keys, dtype="f16", layers=layers, pre="spm")
    m.matrix("altup_proj", inputs - 1, E, E)
    m.matrix("altup_unembd_proj", inputs - 1, E, E)
    _layer_embeddings(m, own)
    for block in m.blocks:
        m.attention(block, qk_norm=True)
        m.gated(block)
        m.norms(block, "post_attention_norm", "post_ffw_norm", "post_norm", "altup_correct_scale", "altup_router_norm")
        m.norms(block, "laurel_post_norm")
        m.matrix(block + "inp_gate", own, E)
        m.matrix(block + "proj", E, own)
        m.values(block + "altup_correct_coef.weight", inputs, inputs, spread=0.3)
        m.values(block + "altup_predict_coef.weight", inputs**2, inputs, spread=0.3)
        m.values(block + "altup_router.weight", inputs, E)
        m.matrix(block + "laurel_l", 64, E)
        m.matrix(block + "laurel_r", E, 64)
    return m.ends(tied=True)


def write_phi3(path: Path | str) -> Path:
    """Phi-3: q, k and v in one matrix, gate and up in one matrix."""
    keys: Keys = {"rope.dimension_count": HEAD, "attention.sliding_window": 0}
    # Of a model named phi3, llama.cpp expects certain tokens.
    m = Layered(path, "phi3", rms(1e-5), keys, name="tiny random phi", pre="spm")
    for block in m.blocks:
        m.norm(block + "attn_norm", E)
        m.matrix(block + "attn_qkv", E + 2 * KV * HEAD, E, gain=0.5)
        m.matrix(block + "attn_output", E, E, gain=0.5)
        m.norm(block + "ffn_norm", E)
        m.matrix(block + "ffn_up", 2 * FF, E)
        m.matrix(block + "ffn_down", E, FF, gain=0.5)
    return m.ends()


def write_starcoder2(path: Path | str) -> Path:
    """StarCoder2: LayerNorm, rotary positions, biases everywhere, GELU."""
    m = Layered(path, "starcoder2", LAYER_NORM, {"rope.freq_base": 10000.0}, pre="starcoder")
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.qkv(block, bias=True, out_bias=True)
        m.norm(block + "ffn_norm", E, bias=True)
        m.plain(block)
    return m.ends(tied=True, bias=True)


def write_mpt(path: Path | str) -> Path:
    """MPT as OPT is written: positions, biases, activations divided by `ffn.act.scales`."""
    m = Layered(path, "mpt", LAYER_NORM, {"attention.max_alibi_bias": 0.0}, kv=HEADS)
    m.embedding("position_embd", CONTEXT, E, size=0.05)
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.linear(block + "attn_qkv", 3 * E, E, gain=0.5)
        m.linear(block + "attn_output", E, E, gain=0.5)
        m.norm(block + "ffn_norm", E, bias=True)
        m.linear(block + "ffn_up", FF, E, gain=1024.0)
        m.writer.add_tensor(block + "ffn.act.scales", np.full(FF, 1024.0, np.float32))
        m.linear(block + "ffn_down", E, FF, gain=0.5)
    return m.ends(tied=True, bias=True)


def write_odd(path: Path | str) -> Path:
    """A LLaMA whose sizes do not suit AGQ4: 160 channels (no product of those) and a feed-forward of 256 + 40 rows."""
    return tiny_models.write_llama(path, dtype="f32", n_embd=160, n_ff=256, n_head=5, n_kv=5)


def write_halves(path: Path | str) -> Path:
    """A LLaMA whose columns are no multiples of 128, and whose vocabulary is no multiple of 16."""
    return tiny_models.write_llama(path, dtype="f32", n_embd=192, n_ff=320, n_head=3, n_kv=1, vocab=453)


def _gated_model(path: Path | str, arch: str, *keys: Keys, tied: bool = False, layers: int = LAYERS) -> Path:
    """LLaMA's tensors, under other rules."""
    m = Layered(path, arch, rms(), ROPE, *keys, layers=layers)
    for block in m.blocks:
        m.attention(block)
        m.gated(block)
    return m.ends(tied=tied)


def write_gemma(path: Path | str) -> Path:
    """Gemma: GeGLU, scaled embedding."""
    return _gated_model(path, "gemma", heads(), tied=True)


def write_granite(path: Path | str) -> Path:
    """Granite: scales of embedding, attention, residuals and logits."""
    scales: Keys = {"logit_scale": 4.0, "residual_scale": 0.3, "embedding_scale": 3.0, "attention.scale": 0.1}
    return _gated_model(path, "granite", scales, tied=True)


def write_smollm3(path: Path | str) -> Path:
    """SmolLM3: each fourth layer without positions."""
    return _gated_model(path, "smollm3", tied=True, layers=4)


def write_yarn(path: Path | str) -> Path:
    """LLaMA with YaRN positions."""
    return _gated_model(path, "llama", YARN)


def write_llama31(path: Path | str) -> Path:
    """LLaMA 3.1: a tensor of frequency factors."""
    m = Layered(path, "llama", rms(), ROPE)
    m.writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, HEAD // 2).astype(np.float32))
    for block in m.blocks:
        m.attention(block)
        m.gated(block)
    return m.ends()


def write_qwen2vl(path: Path | str, *, layers: int = LAYERS) -> Path:
    """Qwen2-VL: positions in sections."""
    m = Layered(path, "qwen2vl", rms(), ROPE, {"rope.dimension_sections": [4, 6, 6, 0]}, layers=layers)
    for block in m.blocks:
        m.attention(block, bias=True)
        m.gated(block)
    return m.ends()


def write_qwen3vl(path: Path | str, *, layers: int = LAYERS) -> Path:
    """Qwen3-VL: sections in another order, norms on queries and keys, parts of an image that are added in layer 0."""
    keys: Keys = {"rope.dimension_sections": [6, 5, 5, 0], "n_deepstack_layers": 1}
    m = Layered(path, "qwen3vl", heads(64), rms(), keys, layers=layers, pre="qwen2")
    for block in m.blocks:
        m.attention(block, head=64, qk_norm=True)
        m.gated(block)
    return m.ends()


def write_stablelm(path: Path | str) -> Path:
    """StableLM: LayerNorm, half of each head turned."""
    m = Layered(path, "stablelm", LAYER_NORM, HALF, {"use_parallel_residual": False})
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.qkv(block)
        m.norm(block + "ffn_norm", E, bias=True)
        m.feed_forward(block)
    return m.ends(bias=True)


def write_phi2(path: Path | str) -> Path:
    """Phi-2: attention and feed-forward side by side on one norm, biases everywhere."""
    m = Layered(path, "phi2", LAYER_NORM, HALF, kv=HEADS)
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.qkv(block, bias=True, out_bias=True)
        m.plain(block)
    return m.ends(bias=True, out_bias=True)


def write_gptneox(path: Path | str) -> Path:
    """GPT-NeoX: attention and feed-forward side by side on two norms, fused qkv."""
    m = Layered(path, "gptneox", LAYER_NORM, HALF, {"use_parallel_residual": True}, kv=HEADS)
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.norm(block + "ffn_norm", E, bias=True)
        m.linear(block + "attn_qkv", 3 * E, E, gain=0.5)
        m.linear(block + "attn_output", E, E, gain=0.5)
        m.plain(block)
    return m.ends(bias=True)


def write_nemotron(path: Path | str) -> Path:
    """Nemotron: squared ReLU."""
    m = Layered(path, "nemotron", LAYER_NORM, HALF)
    for block in m.blocks:
        m.norm(block + "attn_norm", E, bias=True)
        m.qkv(block)
        m.norm(block + "ffn_norm", E, bias=True)
        m.plain(block, bias=False)
    return m.ends(bias=True)


def write_olmo2(path: Path | str) -> Path:
    """OLMo 2: norms behind the parts, and over all heads of queries and keys."""
    m = Layered(path, "olmo2", rms(), ROPE)
    for block in m.blocks:
        m.qkv(block)
        m.feed_forward(block)
        m.norms(block, "attn_q_norm", "post_attention_norm", "post_ffw_norm")
        m.norms(block, "attn_k_norm", size=KV * HEAD)
    return m.ends()


def write_cohere2(path: Path | str, *, layers: int = 4, window: int = 16) -> Path:
    """Command R7B: parallel blocks, sliding windows, scaled logits."""
    numbers = {"attention.sliding_window": window, "logit_scale": 0.25}
    m = Layered(path, "cohere2", LAYER_NORM, ROPE, numbers, layers=layers)
    for block in m.blocks:
        m.attention(block)
        m.feed_forward(block)
    return m.ends(tied=True)


def write_glm4(path: Path | str) -> Path:
    """GLM-4: four norms, gate and up in one matrix, half of each head turned."""
    m = Layered(path, "glm4", rms(), ROPE, HALF)
    for block in m.blocks:
        m.attention(block, bias=True)
        m.norm(block + "ffn_norm", E)
        m.norms(block, "post_attention_norm", "post_ffw_norm")
        m.matrix(block + "ffn_up", 2 * FF, E)
        m.matrix(block + "ffn_down", E, FF, gain=0.5)
    return m.ends()
