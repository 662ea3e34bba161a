"""OPT as llama.cpp's `mpt`, which differs only in the activation: GELU instead of OPT's ReLU.

GELU(c x) / c approaches ReLU(x) as c grows. So `ffn_up` (weight and bias) is multiplied by c, and the graph divides by
`blk.N.ffn.act.scales`, a tensor that `mpt` has for AWQ. ggml's GELU equals ReLU for |x| > 10. So with c = 1024 only
inputs within 0.01 of zero differ, by at most 0.17 / c.
"""

from __future__ import annotations

from typing import Any

import torch
from gguf import MODEL_TENSOR, TENSOR_NAMES

from agq_gguf.errors import InputError
from agq_gguf.import_hf.checkpoint import Config
from agq_gguf.import_hf.plan import Change, Plan, Source, Target

ARCHITECTURES = ("OPTForCausalLM", "OPTModel")
GELU_SCALE = 1024.0
_OFFSET = 2  # the first rows of OPT's position table belong to no position
_LAYER_NORM_EPS = 1e-5  # torch's default; OPT's config has no key for it
_MAX_LAYERS = 4096


def plan(config: Config) -> Plan:
    """The plan for a config. Raises InputError for options that llama.cpp's graph does not support."""
    n_layer = config.size("num_hidden_layers", most=_MAX_LAYERS)
    n_embd, n_ff = config.size("hidden_size"), config.size("ffn_dim")
    n_vocab, n_head = config.size("vocab_size"), config.size("num_attention_heads")
    context = config.size("max_position_embeddings", default=2048)
    if n_embd % n_head:
        raise InputError(f"{config.path}: {n_embd} channels cannot be split into {n_head} heads")
    reason = "llama.cpp's graph normalizes before attention and feed-forward; OPT-350m normalizes after them"
    config.require("do_layer_norm_before", True, True, reason)
    config.require(
        "word_embed_proj_dim", n_embd, n_embd, "embeddings as wide as the layers are needed; OPT-350m has others"
    )
    config.require("_remove_final_layer_norm", False, False, "llama.cpp's graph has a final norm")
    config.require("activation_function", "relu", "relu", "only OPT with ReLU is supported")
    config.require("layer_norm_elementwise_affine", True, True, "OPT's norms have weights")
    biases = config.flag("enable_bias", True)

    def name_of(kind: MODEL_TENSOR, layer: int, suffix: str) -> str:
        return TENSOR_NAMES[kind].format(bid=layer) + suffix

    def target(
        kind: MODEL_TENSOR, layer: int, suffix: str, shape: tuple[int, ...], *names: str, change: Change | None = None
    ) -> Target:
        rows = shape[0] // len(names)
        sources = tuple(Source(name + suffix, (rows, *shape[1:]), change) for name in names)
        return Target(name_of(kind, layer, suffix), shape, sources)

    positions = Source("embed_positions.weight", (context + _OFFSET, n_embd), lambda x: x[_OFFSET:])
    targets = [
        target(MODEL_TENSOR.TOKEN_EMBD, 0, ".weight", (n_vocab, n_embd), "embed_tokens"),
        Target(name_of(MODEL_TENSOR.POS_EMBD, 0, ".weight"), (context, n_embd), (positions,)),
    ]
    for i in range(n_layer):
        layer = f"layers.{i}."
        qkv = tuple(f"{layer}self_attn.{part}_proj" for part in "qkv")
        for kind, rows, columns, names, change in (
            (MODEL_TENSOR.ATTN_QKV, 3 * n_embd, n_embd, qkv, None),
            (MODEL_TENSOR.ATTN_OUT, n_embd, n_embd, (layer + "self_attn.out_proj",), None),
            (MODEL_TENSOR.FFN_UP, n_ff, n_embd, (layer + "fc1",), _saturate),
            (MODEL_TENSOR.FFN_DOWN, n_embd, n_ff, (layer + "fc2",), None),
        ):
            targets.append(target(kind, i, ".weight", (rows, columns), *names, change=change))
            if biases:
                targets.append(target(kind, i, ".bias", (rows,), *names, change=change))
        for kind, name in (
            (MODEL_TENSOR.ATTN_NORM, "self_attn_layer_norm"),
            (MODEL_TENSOR.FFN_NORM, "final_layer_norm"),
        ):
            targets += [target(kind, i, suffix, (n_embd,), layer + name) for suffix in (".weight", ".bias")]
        targets.append(
            Target(name_of(MODEL_TENSOR.FFN_ACT, i, ".act.scales"), (n_ff,), constant=torch.full((n_ff,), GELU_SCALE))
        )
    for suffix in (".weight", ".bias"):
        targets.append(target(MODEL_TENSOR.OUTPUT_NORM, 0, suffix, (n_embd,), "final_layer_norm"))
    tied = config.flag("tie_word_embeddings", True)
    if not tied:
        targets.append(target(MODEL_TENSOR.OUTPUT, 0, ".weight", (n_vocab, n_embd), "lm_head"))

    def set_metadata(writer: Any) -> None:
        writer.add_context_length(context)
        writer.add_embedding_length(n_embd)
        writer.add_block_count(n_layer)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(n_head)
        writer.add_layer_norm_eps(_LAYER_NORM_EPS)
        writer.add_max_alibi_bias(0.0)
        writer.add_vocab_size(n_vocab)

    def ignored(name: str) -> bool:
        return tied and name == "lm_head.weight"

    return Plan("mpt", targets, n_vocab, set_metadata, ignored, ("model.decoder.", "decoder."))


def _saturate(x: torch.Tensor) -> torch.Tensor:
    return x.float() * GELU_SCALE
