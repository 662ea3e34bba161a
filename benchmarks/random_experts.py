"""Writes mixtures of experts with random weights in the shapes of real models, to measure speed.

    python benchmarks/random_experts.py gpt-oss-20b agq4 OUT.gguf --layers 3
    agq-gguf bench mxfp4.gguf q4_0.gguf iq4_nl.gguf agq4.gguf -p 512 -n 64 -t 2 --flash-attn on

All matrices are of one type. Its codes are random, its scales are those of weights of a usual size, so that routing is
even and nothing overflows. There is no vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import random_model
from numpy.typing import NDArray

from agq_gguf.format import blocks

VOCABULARY = 4096
# Bytes of a block of 32 weights: a scale, then codes.
BLOCKS = {"q4_0": 18, "iq4_nl": 18, "mxfp4": 17, "q8_0": 34}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model."""

    architecture: str
    columns: int
    expert_rows: int
    experts: int
    used: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    shared: int = 0  # experts that every token uses; then the first layer has none, but `dense_rows`
    dense_rows: int = 0
    latent: int = 0  # width of the latent keys and values (MLA); then `head` is that of values, without positions
    rope: int = 64  # of `latent`: channels with positions


SHAPES = {
    "gpt-oss-20b": Shape("gpt-oss", 2880, 2880, 32, 4, 64, 8, 64, 24),
    "qwen3-30b-a3b": Shape("qwen3moe", 2048, 768, 128, 8, 32, 4, 128, 48),
    "deepseek-v2-lite": Shape("deepseek2", 2048, 1408, 64, 6, 16, 1, 128, 27, shared=2, dense_rows=10944, latent=512),
}


def random_matrix(type_name: str, rows: int, columns: int) -> tuple[NDArray[np.uint8], int]:
    """Bytes [rows, bytes of a row] of random weights, and the number of their type."""
    rng = np.random.default_rng(rows + columns)
    if type_name == "agq4":
        return random_model.random_agq4(rng, rows, columns), blocks.TYPE_ID
    size, spread = BLOCKS[type_name], columns**-0.5
    made = rng.integers(0, 256, (rows, columns // 32, size), np.uint8)
    if type_name == "mxfp4":
        made[..., 0] = 127 + round(np.log2(spread / 3))  # a power of two
    else:
        unit = spread / {"q4_0": 4.6, "iq4_nl": 60, "q8_0": 74}[type_name]
        made[..., :2] = np.array([unit], np.float16).view(np.uint8)
    return made.reshape(rows, -1), int(gguf.GGMLQuantizationType[type_name.upper()])


def matrices(shape: Shape, layer: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, number of matrices (0: one, without that dimension), rows and columns of every matrix of a layer."""
    width, values = shape.columns, shape.heads * shape.head
    if shape.latent:
        yield "attn_q", 0, values + shape.heads * shape.rope, width
        yield "attn_kv_a_mqa", 0, shape.latent + shape.rope, width
        yield "attn_k_b", shape.heads, shape.latent, shape.head
        yield "attn_v_b", shape.heads, shape.head, shape.latent
    else:
        yield "attn_q", 0, values, width
        yield "attn_k", 0, shape.kv_heads * shape.head, width
        yield "attn_v", 0, shape.kv_heads * shape.head, width
    yield "attn_output", 0, width, values
    parts = [("exps", shape.experts, shape.expert_rows)]
    if shape.shared:
        parts = [*parts, ("shexp", 0, shape.shared * shape.expert_rows)] if layer else [("", 0, shape.dense_rows)]
    for kind, experts, rows in parts:
        suffix = f"_{kind}" if kind else ""
        yield f"ffn_gate{suffix}", experts, rows, width
        yield f"ffn_up{suffix}", experts, rows, width
        yield f"ffn_down{suffix}", experts, width, rows


def write(shape: Shape, type_name: str, path: str, layers: int) -> None:
    """Writes one model; its bytes depend only on the arguments."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.columns)
    writer.add_feed_forward_length(shape.dense_rows or shape.expert_rows)
    writer.add_expert_feed_forward_length(shape.expert_rows)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    writer.add_block_count(layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    if shape.latent:
        writer.add_key_length(shape.latent + shape.rope)
        writer.add_value_length(shape.latent)
        writer.add_key_length_mla(shape.head + shape.rope)
        writer.add_value_length_mla(shape.head)
        writer.add_kv_lora_rank(shape.latent)
        writer.add_q_lora_rank(0)
        writer.add_expert_shared_count(shape.shared)
        writer.add_leading_dense_block_count(1)
        writer.add_expert_weights_scale(1.0)
    else:
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.rope if shape.latent else shape.head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCABULARY)
    is_oss = shape.architecture == "gpt-oss"
    if is_oss:
        writer.add_sliding_window(128)
    rng = np.random.default_rng(0)

    def floats(name: str, *sizes: int, spread: float = 0.0) -> None:
        values = np.ones(sizes) if not spread else rng.normal(0, spread, sizes)
        writer.add_tensor(name, values.astype(np.float32))

    def matrix(name: str, experts: int, rows: int, columns: int) -> None:
        # AGQ4 has no products with one matrix for each head; `agq-gguf quantize` keeps these in Q8_0.
        kind = "q8_0" if type_name == "agq4" and name.endswith(("attn_k_b", "attn_v_b")) else type_name
        packed, number = random_matrix(kind, rows, columns)
        if experts:
            packed = np.broadcast_to(packed, (experts, *packed.shape))
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType(number))

    matrix("token_embd", 0, VOCABULARY, shape.columns)
    matrix("output", 0, VOCABULARY, shape.columns)
    floats("output_norm.weight", shape.columns)
    for i in range(layers):
        block = f"blk.{i}."
        floats(f"{block}attn_norm.weight", shape.columns)
        floats(f"{block}{'post_attention' if is_oss else 'ffn'}_norm.weight", shape.columns)
        if i or not shape.shared:
            floats(f"{block}ffn_gate_inp.weight", shape.experts, shape.columns, spread=shape.columns**-0.5)
        for name, experts, rows, columns in matrices(shape, i):
            matrix(block + name, experts, rows, columns)
            if is_oss:
                sizes = (experts, rows) if experts else (rows,)
                floats(f"{block}{name}.bias", *sizes, spread=0.02)
        if is_oss:
            floats(f"{block}ffn_gate_inp.bias", shape.experts, spread=0.02)
            floats(f"{block}attn_sinks.weight", shape.heads, spread=1.0)
        elif shape.latent:
            floats(f"{block}attn_kv_a_norm.weight", shape.latent)
        else:
            floats(f"{block}attn_q_norm.weight", shape.head)
            floats(f"{block}attn_k_norm.weight", shape.head)
    random_model.finish(writer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=["agq4", *BLOCKS])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=0, help="number of layers; 0: that of the shape")
    arguments = parser.parse_args()
    chosen = SHAPES[arguments.shape]
    write(chosen, arguments.type, arguments.out, arguments.layers or chosen.layers)
