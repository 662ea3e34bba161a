"""BLOOM as llama.cpp's `bloom`: ALiBi, a norm after the embedding, q, k and v in one matrix."""

from __future__ import annotations

from typing import Any

import gguf
import torch

from agq_gguf.errors import InputError
from agq_gguf.import_hf.checkpoint import Config
from agq_gguf.import_hf.plan import Change, Plan, Source, Target

ARCHITECTURES = ("BloomForCausalLM", "BloomModel")
_CONTEXT = 2048  # BLOOM's trained context; ALiBi itself has no limit
_MAX_LAYERS = 4096


def plan(config: Config) -> Plan:
    """The plan for a config. Raises InputError for options that llama.cpp's graph does not support."""
    n_layer = config.size("n_layer", "num_hidden_layers", most=_MAX_LAYERS)
    n_embd = config.size("hidden_size", "n_embed")
    n_vocab, n_head = config.size("vocab_size"), config.size("n_head", "num_attention_heads")
    if n_embd % n_head:
        raise InputError(f"{config.path}: {n_embd} channels cannot be split into {n_head} heads")
    reason = "llama.cpp's graph adds the residual from before the norm"
    config.require("apply_residual_connection_post_layernorm", False, False, reason)
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BLOOM, n_layer)

    def target(name: str, shape: tuple[int, ...], change: Change | None = None) -> Target:
        place = named.get_name(name, (".weight", ".bias"))
        assert place, name
        return Target(place, shape, (Source(name, shape, change),))

    def ungroup(x: torch.Tensor) -> torch.Tensor:
        return split_qkv(x, n_head)

    targets = [target("word_embeddings.weight", (n_vocab, n_embd))]
    norms = ["word_embeddings_layernorm"]
    for i in range(n_layer):
        layer = f"h.{i}."
        for part, rows, columns, change in (
            ("self_attention.query_key_value", 3 * n_embd, n_embd, ungroup),
            ("self_attention.dense", n_embd, n_embd, None),
            ("mlp.dense_h_to_4h", 4 * n_embd, n_embd, None),
            ("mlp.dense_4h_to_h", n_embd, 4 * n_embd, None),
        ):
            targets.append(target(f"{layer}{part}.weight", (rows, columns), change))
            targets.append(target(f"{layer}{part}.bias", (rows,), change))
        norms += [layer + "input_layernorm", layer + "post_attention_layernorm"]
    norms.append("ln_f")
    targets += [target(name + suffix, (n_embd,)) for name in norms for suffix in (".weight", ".bias")]
    tied = config.flag("tie_word_embeddings", True)
    if not tied:
        targets.append(target("lm_head.weight", (n_vocab, n_embd)))

    def set_metadata(writer: Any) -> None:
        writer.add_context_length(config.size("seq_length", default=_CONTEXT))
        writer.add_embedding_length(n_embd)
        writer.add_block_count(n_layer)
        writer.add_feed_forward_length(4 * n_embd)
        writer.add_head_count(n_head)
        writer.add_head_count_kv(n_head)
        writer.add_layer_norm_eps(config.number("layer_norm_epsilon", default=1e-5))
        writer.add_vocab_size(n_vocab)

    def ignored(name: str) -> bool:
        return tied and name == "lm_head.weight"

    return Plan("bloom", targets, n_vocab, set_metadata, ignored, ("transformer.",))


def split_qkv(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders rows from (head, q/k/v, channel) to (q/k/v, head, channel), as llama.cpp splits them."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
