"""Writes the golden files of test_blocks.py: tiny AGQ4 matrices and what they mean.

Run it only when the format version changes: bytes that change without that are a bug.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from agq_gguf.format import blocks, pruning_record, reference

HERE = Path(__file__).parent


# Without and with half a tile at the end of each panel; the last panel of the third one has 7 rows.
SHAPES = ((32, 256), (32, 192), (23, 320))


def matrix(rows: int = 32, columns: int = 256) -> blocks.Matrix:
    """Every feature of the format in use; from plain integer arithmetic, so that no generator matters."""
    groups = columns // 64
    index = np.arange(rows * columns, dtype=np.int64)
    codes = (index * 7 + index // 11 + index // 256 * 3) % 16
    scales = ((index[: rows * groups] * 37 % 101) - 50) / 64
    return blocks.Matrix(
        codes.reshape(rows, columns).astype(np.uint8),
        blocks.round_scale(scales.reshape(rows, groups).astype(np.float32)),
        blocks.Parameters(
            codebook=np.array([0, 5, 17, 26, 36, 45, 53, 60, 66, 72, 79, 86, 95, 105, 117, 127], np.uint8),
            exponents=np.array([3, 0, 1, 15, 2][:groups], np.uint8),
            listed=np.array([200 % columns, 3, 77], np.uint16),
            tensor_scale=float(np.float32(0.0123)),
            activation_bits=8,
            activation_scale="group",
        ),
    )


def rotated(rows: int = 32, columns: int = 256) -> blocks.Matrix:
    """The same with groups that are rotated."""
    plain = matrix(rows, columns)
    return replace(plain, parameters=replace(plain.parameters, activation_scale="rotated"))


PRUNING = pruning_record.Pruning("recent", 0.375, keep=200, reach=3)


def activations(columns: int = 256) -> np.ndarray:
    """[3, columns] f32: ordinary values, zeros, outliers."""
    x = ((np.arange(3 * columns) * 29 % 257) - 128).reshape(3, columns).astype(np.float32) / 32
    x[1] = 0
    x[2, 200 % columns] = 500
    return x


if __name__ == "__main__":
    for rows, columns in SHAPES:
        for kind, m in (("", matrix(rows, columns)), ("_rotated", rotated(rows, columns))):
            name = f"agq4_{rows}x{columns}{kind}"
            xq, s = reference.quantize_activations(activations(columns), m.parameters)
            (HERE / f"{name}.bin").write_bytes(blocks.pack(m).tobytes())
            weights = reference.dequantize(m).astype("<f4")
            (HERE / f"{name}_weights.f32").write_bytes(weights[:4].tobytes())
            (HERE / f"{name}_xq.i8").write_bytes(xq.tobytes() + s.astype("<f4").tobytes())
    pruned = blocks.with_pruning(blocks.pack(matrix()), PRUNING)
    (HERE / "agq4_32x256_pruned.bin").write_bytes(pruned.tobytes())
