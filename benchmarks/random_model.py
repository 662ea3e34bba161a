"""Writes GGUF models in the shape of LLaMA with random weights and no vocabulary, to measure speed.

    python benchmarks/random_model.py 1.1b f16 OUT.gguf       the source for llama-quantize or llama_model_quantize
    python benchmarks/random_model.py 1.1b agq4 OUT.gguf      the same shape, packed as AGQ4

Layers share their bytes while the file is written, but not in the file, so a run reads as much as a real model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import gguf
import numpy as np

import agq_gguf  # noqa: F401  teaches gguf the type AGQ4
from agq_gguf.format import blocks

# name: (embedding, feed-forward, layers, heads, key/value heads, vocabulary)
SHAPES = {
    "tiny": (256, 768, 2, 4, 2, 4096),
    "thin": (128, 128, 22, 4, 2, 256),  # as many nodes as 1.1b, with very small matrices
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}


def tensors(shape: str, layers: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of every matrix; a `layers` other than 0 replaces the shape's number of layers."""
    n_embd, n_ff, n_layer, n_head, n_kv, n_vocab = SHAPES[shape]
    n_layer = layers or n_layer
    kv_rows = n_embd // n_head * n_kv
    yield "token_embd.weight", n_vocab, n_embd
    for i in range(n_layer):
        for name, rows, columns in (
            ("attn_q", n_embd, n_embd),
            ("attn_k", kv_rows, n_embd),
            ("attn_v", kv_rows, n_embd),
            ("attn_output", n_embd, n_embd),
            ("ffn_gate", n_ff, n_embd),
            ("ffn_up", n_ff, n_embd),
            ("ffn_down", n_embd, n_ff),
        ):
            yield f"blk.{i}.{name}.weight", rows, columns
    yield "output.weight", n_vocab, n_embd


def random_agq4(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A packed matrix of random codes with a realistic distribution of values."""
    values = np.array([0, 12, 22, 31, 39, 46, 53, 59, 65, 71, 77, 84, 91, 100, 112, 127], np.uint8)
    parameters = blocks.Parameters(
        values, np.zeros(columns // 64, np.uint8), tensor_scale=columns**-0.5 / 32, activation_scale="rotated"
    )
    codes = rng.integers(0, 16, (rows, columns), np.uint8)
    return blocks.pack(blocks.Matrix(codes, np.ones((rows, columns // 64), np.float32), parameters))


def write(shape: str, type_name: str, path: str, layers: int = 0) -> None:
    """Writes one model; its bytes depend only on the arguments."""
    n_embd, n_ff, n_layer, n_head, n_kv, n_vocab = SHAPES[shape]
    n_layer = layers or n_layer
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_block_count(n_layer)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(n_vocab)
    if type_name == "f16":
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    ones = np.ones(n_embd, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(n_layer):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
    made: dict[tuple[int, int], np.ndarray] = {}
    for name, rows, columns in tensors(shape, layers):
        if (rows, columns) not in made:
            if type_name == "agq4":
                made[rows, columns] = random_agq4(rng, rows, columns)
            else:
                weights = rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)
                made[rows, columns] = weights.astype(np.float16)
        raw_type = gguf.GGMLQuantizationType(blocks.TYPE_ID) if type_name == "agq4" else None
        writer.add_tensor(name, made[rows, columns], raw_dtype=raw_type)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes everything that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=["f16", "agq4"])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=0, help="number of layers; 0: that of the shape")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.type, arguments.out, arguments.layers)
