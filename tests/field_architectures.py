"""Tiny GGUF models of architectures that people run and whose tensors differ from all others.

Latent attention, sinks, short convolutions, chunked experts, embeddings per layer, recurrent layers, and blocks that
predict further tokens. Written like those of `tiny_architectures`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from tiny_architectures import CONTEXT, FF, HEAD, HEADS, KV, VOCAB, E, _attention, _ends, _gated, _heads, _start
from tiny_models import _Model, _sizes, add_bpe_tokenizer, add_spm_tokenizer

LAYERS = 2
EXPERTS, USED, EXPERT_FF = 4, 2, 128


def _vector(model: _Model, name: str, *shape: int, mean: float = 0.0, spread: float = 0.1) -> None:
    model.writer.add_tensor(name, model.rng.normal(mean, spread, shape).astype(np.float32))


def _experts(model: _Model, block: str, *, shared: bool = False) -> None:
    model.matrix(block + "ffn_gate_inp", EXPERTS, E)
    model.matrix(block + "ffn_gate_exps", EXPERTS, EXPERT_FF, E)
    model.matrix(block + "ffn_up_exps", EXPERTS, EXPERT_FF, E, gain=0.5)
    model.matrix(block + "ffn_down_exps", EXPERTS, E, EXPERT_FF, gain=0.5)
    if shared:
        model.matrix(block + "ffn_gate_shexp", EXPERT_FF, E)
        model.matrix(block + "ffn_up_shexp", EXPERT_FF, E, gain=0.5)
        model.matrix(block + "ffn_down_shexp", E, EXPERT_FF, gain=0.5)


def _expert_counts(model: _Model, arch: str, **more: int) -> None:
    counts = {"expert_count": EXPERTS, "expert_used_count": USED, "expert_feed_forward_length": EXPERT_FF, **more}
    for key, value in counts.items():
        model.writer.add_uint32(f"{arch}.{key}", value)


def _further_prediction(model: _Model, block: str) -> None:
    """What a block for multi-token prediction has beside an ordinary layer."""
    model.matrix(block + "nextn.eh_proj", E, 2 * E)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        model.norm(f"{block}nextn.{name}", E, outliers=False)


def write_deepseek2(path: Path | str, *, further: bool = False) -> Path:
    """DeepSeek V2/V3: latent attention (MLA), a dense first layer, shared experts; perhaps a block for MTP."""
    arch, latent, rope, nope, value = "deepseek2", 128, 32, 96, 64
    model = _Model(path, arch, "f32", 0)
    n_layer = LAYERS + further
    _sizes(model, n_layer, E, FF, HEADS, 1, CONTEXT)
    writer = model.writer
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    _expert_counts(model, arch, expert_shared_count=1, leading_dense_block_count=1, expert_gating_func=2)
    lengths = {
        "kv_lora_rank": latent, "q_lora_rank": 128, "key_length": latent + rope, "value_length": latent,
        "key_length_mla": nope + rope, "value_length_mla": value,
    }  # fmt: skip
    for key, length in lengths.items():
        writer.add_uint32(f"{arch}.attention.{key}", length)
    writer.add_rope_dimension_count(rope)
    writer.add_float32(f"{arch}.expert_weights_scale", 2.0)
    writer.add_bool(f"{arch}.expert_weights_norm", True)
    if further:
        writer.add_uint32(f"{arch}.nextn_predict_layers", 1)
    quiet = add_bpe_tokenizer(writer, VOCAB)
    for i in range(n_layer):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E)
        model.norm(block + "attn_kv_a_norm", latent, outliers=False)
        model.norm(block + "attn_q_a_norm", 128, outliers=False)
        model.matrix(block + "attn_q_a", 128, E, gain=0.5)
        model.matrix(block + "attn_q_b", HEADS * (nope + rope), 128)
        model.matrix(block + "attn_kv_a_mqa", latent + rope, E, gain=0.5)
        model.matrix(block + "attn_k_b", HEADS, latent, nope)
        model.matrix(block + "attn_v_b", HEADS, value, latent)
        model.matrix(block + "attn_output", E, HEADS * value, gain=0.5)
        if i == 0:
            _gated(model, block)
        else:
            model.norm(block + "ffn_norm", E)
            _experts(model, block, shared=True)
            _vector(model, block + "exp_probs_b.bias", EXPERTS)
        if i >= LAYERS:
            _further_prediction(model, block)
    return _ends(model, quiet)


def write_glm4moe(path: Path | str, *, further: bool = True) -> Path:
    """GLM-4.5: a dense first layer, shared experts, and a block for multi-token prediction."""
    arch = "glm4moe"
    model = _Model(path, arch, "f32", 0)
    n_layer = LAYERS + further
    _sizes(model, n_layer, E, FF, HEADS, KV, CONTEXT)
    writer = model.writer
    writer.add_vocab_size(VOCAB)
    _heads(model)
    writer.add_layer_norm_rms_eps(1e-5)
    _expert_counts(model, arch, expert_shared_count=1, leading_dense_block_count=1)
    writer.add_float32(f"{arch}.expert_weights_scale", 1.0)
    writer.add_bool(f"{arch}.expert_weights_norm", True)
    if further:
        writer.add_uint32(f"{arch}.nextn_predict_layers", 1)
    quiet = add_bpe_tokenizer(writer, VOCAB, pre="glm4")
    for i in range(n_layer):
        block = f"blk.{i}."
        _attention(model, block, qk_norm=True)
        model.norm(block + "post_attention_norm", E)
        if i == 0:
            model.matrix(block + "ffn_gate", FF, E)
            model.matrix(block + "ffn_up", FF, E, gain=0.5)
            model.matrix(block + "ffn_down", E, FF, gain=0.5)
        else:
            _experts(model, block, shared=True)
            _vector(model, block + "exp_probs_b.bias", EXPERTS)
        if i >= LAYERS:
            _further_prediction(model, block)
    return _ends(model, quiet)


def write_gpt_oss(path: Path | str, *, mxfp4: bool = False, unused: int | None = None) -> Path:
    """gpt-oss: sinks, biases everywhere, every second layer with a sliding window; experts perhaps in MXFP4.

    No token chooses the expert `unused`.
    """
    arch, head = "gpt-oss", 64
    model = _start(path, arch)
    writer = model.writer
    _heads(model, head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(16)
    _expert_counts(model, arch)
    quiet = add_bpe_tokenizer(writer, VOCAB, pre="gpt-4o")
    for i in range(LAYERS):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E)
        model.norm(block + "post_attention_norm", E)
        for name, rows in (("q", HEADS * head), ("k", KV * head), ("v", KV * head)):
            model.linear(f"{block}attn_{name}", rows, E, gain=0.5)
        model.linear(block + "attn_output", E, HEADS * head, gain=0.5)
        _vector(model, block + "attn_sinks.weight", HEADS, mean=1.0, spread=1.0)
        model.matrix(block + "ffn_gate_inp", EXPERTS, E)
        chances = model.rng.normal(0, 0.1, EXPERTS).astype(np.float32)
        if unused is not None:
            chances[unused] = -1e4
        writer.add_tensor(block + "ffn_gate_inp.bias", chances)
        for name, rows, columns in (("gate", EXPERT_FF, E), ("up", EXPERT_FF, E), ("down", E, EXPERT_FF)):
            tensor = f"{block}ffn_{name}_exps"
            if mxfp4:
                weight = model.rng.standard_normal((EXPERTS * rows, columns)).astype(np.float32) / np.sqrt(columns)
                kind = gguf.GGMLQuantizationType.MXFP4
                packed = gguf.quants.quantize(weight.astype(np.float32), kind).reshape(EXPERTS, rows, -1)
                writer.add_tensor(tensor + ".weight", packed, raw_dtype=kind)
            else:
                model.matrix(tensor, EXPERTS, rows, columns, gain=0.7)
            _vector(model, tensor + ".bias", EXPERTS, rows)
    return _ends(model, quiet)


def write_lfm2(path: Path | str) -> Path:
    """LFM2: one layer with a short convolution, one with attention."""
    arch = "lfm2"
    model = _Model(path, arch, "f32", 0)
    writer = model.writer
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(E)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_array(f"{arch}.attention.head_count_kv", [0, KV])
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_uint32(f"{arch}.shortconv.l_cache", 3)
    quiet = add_bpe_tokenizer(writer, VOCAB, pre="lfm2")
    _gated(model, "blk.0.")
    model.norm("blk.0.attn_norm", E)
    _vector(model, "blk.0.shortconv.conv.weight", E, 3, spread=0.6)
    model.matrix("blk.0.shortconv.in_proj", 3 * E, E)
    model.matrix("blk.0.shortconv.out_proj", E, E, gain=0.5)
    _gated(model, "blk.1.")
    _attention(model, "blk.1.", qk_norm=True)
    model.output("token_embd", VOCAB, E, quiet=quiet)
    model.norm("token_embd_norm", E, outliers=False)
    return model.finish()


def write_gemma_embedding(path: Path | str) -> Path:
    """EmbeddingGemma: attention in both directions, mean pooling, two dense layers behind it."""
    arch = "gemma-embedding"
    model = _start(path, arch)
    writer = model.writer
    _heads(model)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(16)
    writer.add_uint32(f"{arch}.attention.sliding_window_pattern", 2)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    for key, size in (("2_feat_in", E), ("2_feat_out", 512), ("3_feat_in", 512), ("3_feat_out", E)):
        writer.add_uint32(f"{arch}.dense_{key}", size)
    quiet = add_spm_tokenizer(writer, VOCAB)
    for i in range(LAYERS):
        block = f"blk.{i}."
        _attention(model, block, qk_norm=True)
        _gated(model, block)
        model.norm(block + "post_attention_norm", E, outliers=False)
        model.norm(block + "post_ffw_norm", E, outliers=False)
    model.matrix("dense_2", 512, E)
    model.matrix("dense_3", E, 512)
    return _ends(model, quiet, tied=True)


def write_gemma3n(path: Path | str) -> Path:
    """Gemma 3n: an embedding for each layer, alternating updates (AltUp), low-rank residuals (LAuReL)."""
    arch, own, inputs = "gemma3n", 256, 4
    model = _Model(path, arch, "f16", 0)
    writer = model.writer
    _sizes(model, LAYERS, E, FF, HEADS, KV, CONTEXT)
    writer.add_vocab_size(VOCAB)
    _heads(model)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(16)
    for key, value in (("embedding_length_per_layer_input", own), ("altup.active_idx", 0), ("altup.num_inputs", inputs),
                       ("attention.shared_kv_layers", 0)):  # fmt: skip
        writer.add_uint32(f"{arch}.{key}", value)
    quiet = add_spm_tokenizer(writer, VOCAB)
    model.matrix("altup_proj", inputs - 1, E, E)
    model.matrix("altup_unembd_proj", inputs - 1, E, E)
    model.embedding("per_layer_token_embd", VOCAB, own * LAYERS)
    model.matrix("per_layer_model_proj", own * LAYERS, E)
    model.norm("per_layer_proj_norm", own, outliers=False)
    for i in range(LAYERS):
        block = f"blk.{i}."
        _attention(model, block, qk_norm=True)
        _gated(model, block)
        for name in ("post_attention_norm", "post_ffw_norm", "post_norm", "altup_correct_scale", "altup_router_norm",
                     "laurel_post_norm"):  # fmt: skip
            model.norm(block + name, E, outliers=False)
        model.matrix(block + "inp_gate", own, E)
        model.matrix(block + "proj", E, own)
        _vector(model, block + "altup_correct_coef.weight", inputs, inputs, spread=0.3)
        _vector(model, block + "altup_predict_coef.weight", inputs**2, inputs, spread=0.3)
        _vector(model, block + "altup_router.weight", inputs, E)
        model.matrix(block + "laurel_l", 64, E)
        model.matrix(block + "laurel_r", E, 64)
    model.output("token_embd", VOCAB, E, quiet=quiet)
    model.norm("output_norm", E, outliers=False)
    return model.finish()


def write_grovemoe(path: Path | str) -> Path:
    """GroveMoE: experts, and chunks of experts that groups of them share."""
    arch = "grovemoe"
    model = _start(path, arch)
    writer = model.writer
    _heads(model)
    writer.add_layer_norm_rms_eps(1e-6)
    _expert_counts(model, arch, expert_chunk_feed_forward_length=EXPERT_FF, experts_per_group=2)
    writer.add_float32(f"{arch}.expert_group_scale", 0.05)
    quiet = add_bpe_tokenizer(writer, VOCAB, pre="qwen2")
    for i in range(LAYERS):
        block = f"blk.{i}."
        _attention(model, block, qk_norm=True)
        model.norm(block + "ffn_norm", E)
        _experts(model, block)
        model.matrix(block + "ffn_gate_chexps", 2, EXPERT_FF, E)
        model.matrix(block + "ffn_up_chexps", 2, EXPERT_FF, E, gain=0.5)
        model.matrix(block + "ffn_down_chexps", 2, E, EXPERT_FF, gain=0.5)
    return _ends(model, quiet)


def write_granitehybrid(path: Path | str) -> Path:
    """Granite 4: one Mamba 2 layer, one with attention, both with experts; scales for everything."""
    arch, inner, state, steps = "granitehybrid", 2 * E, 32, 16
    model = _Model(path, arch, "f32", 0)
    writer = model.writer
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(E)
    writer.add_feed_forward_length(EXPERT_FF)
    writer.add_head_count(HEADS)
    writer.add_array(f"{arch}.attention.head_count_kv", [0, KV])
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(steps)
    writer.add_ssm_group_count(1)
    _expert_counts(model, arch, expert_shared_feed_forward_length=EXPERT_FF)
    scales = {"residual_scale": 0.5, "embedding_scale": 2.0, "attention.scale": 0.17, "logit_scale": 2.0}
    for key, scale in scales.items():
        writer.add_float32(f"{arch}.{key}", scale)
    quiet = add_bpe_tokenizer(writer, VOCAB, pre="dbrx")
    channels = inner + 2 * state
    model.norm("blk.0.attn_norm", E)
    model.matrix("blk.0.ssm_in", inner + channels + steps, E)
    _vector(model, "blk.0.ssm_conv1d.weight", channels, 4, spread=0.5)
    model.bias("blk.0.ssm_conv1d", channels)
    model.bias("blk.0.ssm_dt", steps)
    writer.add_tensor("blk.0.ssm_a", -np.arange(1, steps + 1, dtype=np.float32).reshape(steps, 1))
    writer.add_tensor("blk.0.ssm_d", np.ones((steps, 1), np.float32))
    _vector(model, "blk.0.ssm_norm.weight", 1, inner, mean=1.0)
    model.matrix("blk.0.ssm_out", E, inner, gain=0.5)
    _attention(model, "blk.1.")
    for i in range(LAYERS):
        model.norm(f"blk.{i}.ffn_norm", E)
        _experts(model, f"blk.{i}.", shared=True)
    return _ends(model, quiet, tied=True)


def write_rwkv7(path: Path | str) -> Path:
    """RWKV 7: no attention; a state that each token updates."""
    arch, head, rank = "rwkv7", 64, 64
    model = _Model(path, arch, "f32", 0)
    writer = model.writer
    _sizes(model, LAYERS, E, 2 * FF, 0, 0, CONTEXT)
    writer.add_vocab_size(VOCAB)
    writer.add_layer_norm_eps(1e-5)
    writer.add_uint32(f"{arch}.wkv.head_size", head)
    for name in ("decay", "iclr", "value_residual_mix", "gate"):
        writer.add_uint32(f"{arch}.attention.{name}_lora_rank", rank)
    quiet = add_bpe_tokenizer(writer, VOCAB)
    model.norm("token_embd_norm", E, bias=True, outliers=False)
    for i in range(LAYERS):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E, bias=True)
        model.norm(block + "attn_norm_2", E, bias=True)
        for name, mean, spread in (("w0", 0, 0.3), ("a0", 0, 0.3), ("v0", 0, 0.3), ("k_k", 1, 0.1), ("k_a", 1, 0.1),
                                   ("r_k", 0, 0.1)):  # fmt: skip
            _vector(model, f"{block}time_mix_{name}.weight", E, mean=mean, spread=spread)
        for name in ("w", "a", "v", "g"):
            model.matrix(f"{block}time_mix_{name}1", rank, E)
            model.matrix(f"{block}time_mix_{name}2", E, rank)
        mixing = model.rng.uniform(0, 1, (6, 1, 1, E)).astype(np.float32)
        writer.add_tensor(block + "time_mix_lerp_fused.weight", mixing)
        for name in ("key", "value", "receptance"):
            model.matrix(f"{block}time_mix_{name}", E, E)
        model.norm(block + "time_mix_ln", E, bias=True, outliers=False)
        model.matrix(block + "time_mix_output", E, E, gain=0.5)
        _vector(model, block + "channel_mix_lerp_k.weight", E, spread=0.3)
        model.matrix(block + "channel_mix_key", 2 * FF, E, gain=0.7)
        model.matrix(block + "channel_mix_value", E, 2 * FF, gain=0.5)
    model.embedding("token_embd", VOCAB, E)
    model.output("output", VOCAB, E, quiet=quiet)
    model.norm("output_norm", E, bias=True, outliers=False)
    return model.finish()


WRITERS: dict[str, Callable[[Path | str], Path]] = {
    "deepseek2": write_deepseek2,
    "gemma-embedding": write_gemma_embedding,
    "gemma3n": write_gemma3n,
    "glm4moe": write_glm4moe,
    "gpt-oss": write_gpt_oss,
    "granitehybrid": write_granitehybrid,
    "grovemoe": write_grovemoe,
    "lfm2": write_lfm2,
    "rwkv7": write_rwkv7,
}
