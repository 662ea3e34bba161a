"""Rotates pairs of residual channels of a LLaMA, so that its weights fit no quantization type's grid.

    python benchmarks/rotate_llama.py IN.gguf OUT.gguf

For comparisons on models that were quantized before: weights restored from Q4_1, for example, fit Q4_K's grid exactly.
Each channel of the residual stream is paired with another, and the pair is rotated by 17 to 34 degrees. For this the
norm weights are folded into the matrices, and afterwards taken out again with values between the old two, so that
activations keep their outliers. The model's function does not change, apart from rounding to the tensors' types. The
output matrix becomes a separate tensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout

ARCHITECTURES = ("llama", "qwen2", "qwen3")
READERS = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}  # of what a norm makes
DTYPES = {"f16": np.float16, "f32": np.float32}
Array = NDArray[np.float64]


class Turn:
    """A rotation of random pairs of the used channels."""

    def __init__(self, used: NDArray[np.int64], seed: int = 0):
        rng = np.random.default_rng(seed)
        mixed = rng.permutation(used)
        half = len(mixed) // 2
        self.a, self.b = mixed[:half], mixed[half : 2 * half]
        angle = rng.uniform(0.3, 0.6, half)
        self.cos, self.sin = np.cos(angle), np.sin(angle)

    def columns(self, w: Array) -> Array:
        """W R^T: a matrix, or rows of it, that reads the rotated stream."""
        w = w.copy()
        x, y = w[:, self.a].copy(), w[:, self.b].copy()
        w[:, self.a], w[:, self.b] = self.cos * x + self.sin * y, self.cos * y - self.sin * x
        return w

    def norm(self, g: Array) -> Array:
        """New norm weights."""
        new = g.copy()
        new[self.a] = np.hypot(self.cos * g[self.a], self.sin * g[self.b])
        new[self.b] = np.hypot(self.cos * g[self.b], self.sin * g[self.a])
        return np.where(new == 0, 1.0, new)


def main() -> None:
    """Reads, rotates, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    with open_gguf(args.source) as reader:
        if reader.architecture not in ARCHITECTURES or "blk.0.ffn_gate.weight" not in reader.tensors:
            raise SystemExit(f"{args.source}: must be one of {', '.join(ARCHITECTURES)} without experts")
        types = {name: tensor.type_name for name, tensor in reader.tensors.items()}
        tensors = {name: np.array(reader.read(name), np.float64) for name in types}
        layers = int(reader.get(f"{reader.architecture}.block_count"))
        embedding = tensors["token_embd.weight"]
        turn = Turn(np.flatnonzero(embedding.any(axis=0)))
        tensors.setdefault("output.weight", embedding)
        types.setdefault("output.weight", types["token_embd.weight"])
        behind = {"output_norm.weight": ["output.weight"]}
        for layer in range(layers):
            for norm, names in READERS.items():
                behind[f"blk.{layer}.{norm}.weight"] = [f"blk.{layer}.{name}.weight" for name in names]
            for name in ("attn_output", "ffn_down"):
                key = f"blk.{layer}.{name}.weight"
                tensors[key] = turn.columns(tensors[key].T).T
                if (bias := f"blk.{layer}.{name}.bias") in tensors:
                    tensors[bias] = turn.columns(tensors[bias][None])[0]
        for norm, matrices in behind.items():
            new = turn.norm(tensors[norm])
            for name in matrices:
                tensors[name] = turn.columns(tensors[name] * tensors[norm]) / new
            tensors[norm] = new
        tensors["token_embd.weight"] = turn.columns(embedding)
        placed = layout((name, types[name], values.shape) for name, values in tensors.items())
        with Writer(args.target, reader.metadata, {}, placed) as writer:
            for name, values in tensors.items():
                writer.write(name, [np.ascontiguousarray(values).astype(DTYPES[types[name]])])


if __name__ == "__main__":
    main()
