"""More tiny GGUF models with random weights, one writer for each architecture of llama.cpp that `tiny_models` lacks.

They are for seeing that quantized products run in graphs of every kind: other norms and positions, fused matrices,
soft caps, sliding windows, experts, encoders with decoders, recurrent layers, and shapes that AGQ4 cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny_models
from tiny_models import _Model, _sizes, add_bpe_tokenizer, add_spm_tokenizer

E, FF, HEADS, KV, HEAD, VOCAB, CONTEXT = 128, 256, 4, 2, 32, 512, 256


def _start(path: Path | str, arch: str, layers: int = 2) -> _Model:
    model = _Model(path, arch, "f32", 0)
    _sizes(model, layers, E, FF, HEADS, KV, CONTEXT)
    model.writer.add_vocab_size(VOCAB)
    return model


def _heads(model: _Model, size: int = HEAD) -> None:
    model.writer.add_key_length(size)
    model.writer.add_value_length(size)
    model.writer.add_rope_dimension_count(size)
    model.writer.add_rope_freq_base(10000.0)


def _attention(model: _Model, block: str, *, head: int = HEAD, qk_norm: bool = False) -> None:
    model.norm(block + "attn_norm", E)
    model.matrix(block + "attn_q", HEADS * head, E, gain=0.5)
    model.matrix(block + "attn_k", KV * head, E, gain=0.5)
    model.matrix(block + "attn_v", KV * head, E, gain=0.5)
    model.matrix(block + "attn_output", E, HEADS * head, gain=0.5)
    if qk_norm:
        model.norm(block + "attn_q_norm", head, outliers=False)
        model.norm(block + "attn_k_norm", head, outliers=False)


def _gated(model: _Model, block: str) -> None:
    model.norm(block + "ffn_norm", E)
    model.matrix(block + "ffn_gate", FF, E)
    model.matrix(block + "ffn_up", FF, E, gain=0.5)
    model.matrix(block + "ffn_down", E, FF, gain=0.5)


def _ends(model: _Model, quiet: list[int], *, tied: bool = False, bias: bool = False) -> Path:
    if tied:
        model.output("token_embd", VOCAB, E, quiet=quiet)
    else:
        model.embedding("token_embd", VOCAB, E)
        model.output("output", VOCAB, E, quiet=quiet)
    model.norm("output_norm", E, bias=bias, outliers=False)
    return model.finish()


def write_qwen3(path: Path | str) -> Path:
    """Qwen3: norms on queries and keys, heads that are wider than the model's share."""
    model = _start(path, "qwen3")
    _heads(model, 64)
    model.writer.add_layer_norm_rms_eps(1e-6)
    quiet = add_bpe_tokenizer(model.writer, VOCAB, pre="qwen2")
    for i in range(2):
        _attention(model, f"blk.{i}.", head=64, qk_norm=True)
        _gated(model, f"blk.{i}.")
    return _ends(model, quiet)


def write_qwen3moe(path: Path | str) -> Path:
    """Qwen3's mixture of experts: 5 experts, 3 of them used, with their own width."""
    model = _start(path, "qwen3moe")
    _heads(model)
    model.writer.add_layer_norm_rms_eps(1e-6)
    model.writer.add_expert_count(5)
    model.writer.add_expert_used_count(3)
    model.writer.add_expert_feed_forward_length(128)
    quiet = add_bpe_tokenizer(model.writer, VOCAB, pre="qwen2")
    for i in range(2):
        block = f"blk.{i}."
        _attention(model, block, qk_norm=True)
        model.norm(block + "ffn_norm", E)
        model.matrix(block + "ffn_gate_inp", 5, E)
        model.matrix(block + "ffn_gate_exps", 5, 128, E)
        model.matrix(block + "ffn_up_exps", 5, 128, E, gain=0.5)
        model.matrix(block + "ffn_down_exps", 5, E, 128, gain=0.5)
    return _ends(model, quiet)


def _write_gemma(
    path: Path | str, arch: str, *, tied: bool = True, layers: int = 2, window: int = 16, cap: float = 50.0
) -> Path:
    model = _start(path, arch, layers)
    _heads(model)
    model.writer.add_layer_norm_rms_eps(1e-6)
    model.writer.add_sliding_window(window)  # shorter than the tests' texts
    model.writer.add_sliding_window_pattern(2)
    if arch == "gemma2":
        model.writer.add_attn_logit_softcapping(cap)
        model.writer.add_final_logit_softcapping(30.0)
    quiet = add_spm_tokenizer(model.writer, VOCAB)
    for i in range(layers):
        block = f"blk.{i}."
        _attention(model, block, qk_norm=arch == "gemma3")
        _gated(model, block)
        model.norm(block + "post_attention_norm", E, outliers=False)
        model.norm(block + "post_ffw_norm", E, outliers=False)
    return _ends(model, quiet, tied=tied)


def write_gemma2(path: Path | str, *, layers: int = 2, window: int = 16, cap: float = 50.0) -> Path:
    """Gemma 2: soft caps, norms before and behind, each second layer with a sliding window, tied output."""
    return _write_gemma(path, "gemma2", layers=layers, window=window, cap=cap)


def write_gemma3(path: Path | str, *, tied: bool = True, layers: int = 2, window: int = 16) -> Path:
    """Gemma 3: norms on queries and keys, every second layer with a sliding window, tied output."""
    return _write_gemma(path, "gemma3", tied=tied, layers=layers, window=window)


def write_phi3(path: Path | str) -> Path:
    """Phi-3: q, k and v in one matrix, gate and up in one matrix."""
    model = _start(path, "phi3")
    model.writer.add_name("tiny random phi")  # of a model named phi3, llama.cpp expects certain tokens
    model.writer.add_rope_dimension_count(HEAD)
    model.writer.add_layer_norm_rms_eps(1e-5)
    model.writer.add_sliding_window(0)
    quiet = add_spm_tokenizer(model.writer, VOCAB)
    for i in range(2):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E)
        model.matrix(block + "attn_qkv", E + 2 * KV * HEAD, E, gain=0.5)
        model.matrix(block + "attn_output", E, E, gain=0.5)
        model.norm(block + "ffn_norm", E)
        model.matrix(block + "ffn_up", 2 * FF, E)
        model.matrix(block + "ffn_down", E, FF, gain=0.5)
    return _ends(model, quiet)


def write_starcoder2(path: Path | str) -> Path:
    """StarCoder2: LayerNorm, rotary positions, biases everywhere, GELU."""
    model = _start(path, "starcoder2")
    model.writer.add_layer_norm_eps(1e-5)
    model.writer.add_rope_freq_base(10000.0)
    quiet = add_bpe_tokenizer(model.writer, VOCAB, pre="starcoder")
    for i in range(2):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E, bias=True)
        model.linear(block + "attn_q", E, E, gain=0.5)
        model.linear(block + "attn_k", KV * HEAD, E, gain=0.5)
        model.linear(block + "attn_v", KV * HEAD, E, gain=0.5)
        model.linear(block + "attn_output", E, E, gain=0.5)
        model.norm(block + "ffn_norm", E, bias=True)
        model.linear(block + "ffn_up", FF, E)
        model.linear(block + "ffn_down", E, FF, gain=0.5)
    return _ends(model, quiet, tied=True, bias=True)


def write_mpt(path: Path | str) -> Path:
    """MPT as OPT is written: positions, biases, activations divided by `ffn.act.scales`."""
    model = _Model(path, "mpt", "f32", 0)
    _sizes(model, 2, E, FF, HEADS, HEADS, CONTEXT)
    model.writer.add_vocab_size(VOCAB)
    model.writer.add_layer_norm_eps(1e-5)
    model.writer.add_max_alibi_bias(0.0)
    quiet = add_bpe_tokenizer(model.writer, VOCAB)
    model.embedding("position_embd", CONTEXT, E, size=0.05)
    for i in range(2):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E, bias=True)
        model.linear(block + "attn_qkv", 3 * E, E, gain=0.5)
        model.linear(block + "attn_output", E, E, gain=0.5)
        model.norm(block + "ffn_norm", E, bias=True)
        model.linear(block + "ffn_up", FF, E, gain=1024.0)
        model.writer.add_tensor(block + "ffn.act.scales", np.full(FF, 1024.0, np.float32))
        model.linear(block + "ffn_down", E, FF, gain=0.5)
    return _ends(model, quiet, tied=True, bias=True)


def write_mamba(path: Path | str) -> Path:
    """Mamba: recurrent, no attention; of its matrices, ssm_x has 40 rows and ssm_dt 8 columns."""
    model = _Model(path, "mamba", "f32", 0)
    inner, state, rank = 2 * E, 16, 8
    _sizes(model, 2, E, 0, 0, 0, CONTEXT)
    model.writer.add_vocab_size(VOCAB)
    model.writer.add_ssm_conv_kernel(4)
    model.writer.add_ssm_inner_size(inner)
    model.writer.add_ssm_state_size(state)
    model.writer.add_ssm_time_step_rank(rank)
    model.writer.add_layer_norm_rms_eps(1e-5)
    quiet = add_bpe_tokenizer(model.writer, VOCAB, pre="gpt-2")
    for i in range(2):
        block = f"blk.{i}."
        model.norm(block + "attn_norm", E)
        model.matrix(block + "ssm_in", 2 * inner, E)
        model.linear(block + "ssm_conv1d", inner, 4)
        model.matrix(block + "ssm_x", rank + 2 * state, inner, gain=0.5)
        model.linear(block + "ssm_dt", inner, rank)
        decay = -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
        model.writer.add_tensor(block + "ssm_a", decay)
        model.writer.add_tensor(block + "ssm_d", np.ones(inner, np.float32))
        model.matrix(block + "ssm_out", E, inner)
    return _ends(model, quiet)


def write_diffusion(path: Path | str, arch: str) -> Path:
    """Dream or LLaDA, whose attention sees all tokens; only llama.cpp's code says so, no key of the file."""
    model = _start(path, arch)
    _heads(model)
    model.writer.add_layer_norm_rms_eps(1e-6)
    quiet = add_bpe_tokenizer(model.writer, VOCAB, pre="qwen2")
    for i in range(2):
        _attention(model, f"blk.{i}.")
        _gated(model, f"blk.{i}.")
    return _ends(model, quiet)


def write_t5(path: Path | str) -> Path:
    """T5: an encoder, and a decoder that looks at it; positions by a table of relative distances."""
    model = _Model(path, "t5", "f32", 0)
    _sizes(model, 2, E, FF, HEADS, HEADS, CONTEXT)
    model.writer.add_vocab_size(VOCAB)
    _heads(model)
    model.writer.add_layer_norm_rms_eps(1e-6)
    model.writer.add_relative_attn_buckets_count(32)
    model.writer.add_decoder_start_token_id(1)
    quiet = add_spm_tokenizer(model.writer, VOCAB)
    for side, parts in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        for i in range(2):
            block = f"{side}.blk.{i}."
            for part in parts:
                model.norm(block + part + "_norm", E)
                for name in "qkvo":
                    model.matrix(f"{block}{part}_{name}", E, E, gain=0.3)
            if i == 0:
                model.matrix(block + "attn_rel_b", 32, HEADS)
            _gated(model, block)
        model.norm(f"{side}.output_norm", E, outliers=False)
    model.embedding("token_embd", VOCAB, E)
    model.output("output", VOCAB, E, quiet=quiet)
    return model.finish()


def write_odd(path: Path | str) -> Path:
    """A LLaMA whose sizes do not suit AGQ4: 160 channels (no product of those) and a feed-forward of 256 + 40 rows."""
    return tiny_models.write_llama(path, dtype="f32", n_embd=160, n_ff=256, n_head=5, n_kv=5)


def write_halves(path: Path | str) -> Path:
    """A LLaMA whose columns are no multiples of 128, and whose vocabulary is no multiple of 16."""
    return tiny_models.write_llama(path, dtype="f32", n_embd=192, n_ff=320, n_head=3, n_kv=1, vocab=453)


def write_mixtral(path: Path | str) -> Path:
    """Mixtral: LLaMA with 4 experts, 2 of them used."""
    return tiny_models.write_llama(path, dtype="f32", n_expert=4, n_expert_used=2)


def _known(name: str) -> Callable[[Path | str], Path]:
    return lambda path: tiny_models.WRITERS[name](path, dtype="f32")


DECODERS: dict[str, Callable[[Path | str], Path]] = {
    **{name: _known(name) for name in ("llama", "qwen2", "gpt2", "bloom", "falcon")},
    "qwen3": write_qwen3,
    "gemma2": write_gemma2,
    "gemma3": write_gemma3,
    "phi3": write_phi3,
    "starcoder2": write_starcoder2,
    "mpt": write_mpt,
    "mixtral": write_mixtral,
    "qwen3moe": write_qwen3moe,
    "mamba": write_mamba,
    "odd": write_odd,
    "halves": write_halves,
}
