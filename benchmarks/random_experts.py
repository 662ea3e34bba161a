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
# Bytes of a block of 32 weights: a scale, then 16 bytes of codes.
BLOCKS = {"q4_0": 18, "iq4_nl": 18, "mxfp4": 17}


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


SHAPES = {
    "gpt-oss-20b": Shape("gpt-oss", 2880, 2880, 32, 4, 64, 8, 64, 24),
    "qwen3-30b-a3b": Shape("qwen3moe", 2048, 768, 128, 8, 32, 4, 128, 48),
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
        unit = spread / (4.6 if type_name == "q4_0" else 60)
        made[..., :2] = np.array([unit], np.float16).view(np.uint8)
    return made.reshape(rows, -1), int(gguf.GGMLQuantizationType[type_name.upper()])


def matrices(shape: Shape) -> Iterator[tuple[str, int, int, int]]:
    """Name, experts (0: not experts), rows and columns of every matrix of a layer."""
    q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    yield "attn_q", 0, q, shape.columns
    yield "attn_k", 0, kv, shape.columns
    yield "attn_v", 0, kv, shape.columns
    yield "attn_output", 0, shape.columns, q
    yield "ffn_gate_exps", shape.experts, shape.expert_rows, shape.columns
    yield "ffn_up_exps", shape.experts, shape.expert_rows, shape.columns
    yield "ffn_down_exps", shape.experts, shape.columns, shape.expert_rows


def write(shape: Shape, type_name: str, path: str, layers: int) -> None:
    """Writes one model; its bytes depend only on the arguments."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.columns)
    writer.add_feed_forward_length(shape.expert_rows)
    writer.add_expert_feed_forward_length(shape.expert_rows)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    writer.add_block_count(layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
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
        packed, number = random_matrix(type_name, rows, columns)
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
        floats(f"{block}ffn_gate_inp.weight", shape.experts, shape.columns, spread=shape.columns**-0.5)
        for name, experts, rows, columns in matrices(shape):
            matrix(block + name, experts, rows, columns)
            if is_oss:
                sizes = (experts, rows) if experts else (rows,)
                floats(f"{block}{name}.bias", *sizes, spread=0.02)
        if is_oss:
            floats(f"{block}ffn_gate_inp.bias", shape.experts, spread=0.02)
            floats(f"{block}attn_sinks.weight", shape.heads, spread=1.0)
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
