"""Valid inputs, and ways to break them: what the Python fuzzers are made of."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np

from agq_gguf.format import blocks
from agq_gguf.format.blocks import Matrix, Parameters

_NUMBERS = [0, 1, 2, 7, 8, 15, 16, 31, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]
_NUMBERS += [2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def mutate(data: bytes, choose: random.Random, others: list[bytes]) -> bytes:
    """One to four changes: bits, bytes, whole numbers, pieces removed, repeated or taken from another input."""
    out = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 4))):
        at, kind = choose.randrange(len(out) + 1), choose.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << choose.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = choose.choice(_NUMBERS) & 255
        elif kind in (2, 3):
            width = choose.choice((1, 2, 4, 8))
            number = (choose.choice(_NUMBERS) + choose.choice((0, 0, 1, -1))) & (2 ** (8 * width) - 1)
            out[at : at + width] = number.to_bytes(width, "little")
        elif kind == 4:
            del out[at : at + choose.choice((1, 4, 8, 64))]
        elif kind == 5:
            piece = out[at : at + choose.choice((1, 4, 8, 64))]
            out[at:at] = piece * choose.choice((1, 2, 16))
        elif kind == 6:
            other = choose.choice(others)
            begin = choose.randrange(len(other))
            out[at : at + 16] = other[begin : begin + choose.choice((4, 16, 64))]
        elif kind == 7:
            del out[at:]
    return bytes(out)


def gguf_seeds(folder: Path) -> list[bytes]:
    """Small valid files: every type of metadata, AGQ4 and other tensors, experts, a part of a split, an imatrix."""
    rng = np.random.default_rng(0)
    codebook = np.arange(8, 120, 7, dtype=np.uint8)
    matrix = Matrix(
        rng.integers(0, 16, (32, 256), dtype=np.uint8),
        blocks.round_scale(rng.standard_normal((32, 4)).astype(np.float32)),
        Parameters(codebook, np.zeros(4, np.uint8), np.array([7, 3], np.uint16)),
    )
    packed = blocks.pack(matrix)
    found = []
    for i in range(3):
        writer = gguf.GGUFWriter(folder / f"seed{i}", "llama" if i else "")
        writer.add_name("seed")
        writer.add_array("tokens", ["a", "", "bc"])
        if i == 0:
            for code, value in (("uint8", 1), ("int8", -1), ("uint16", 2), ("int16", -2), ("uint32", 3), ("int32", -3),
                                ("uint64", 4), ("int64", -4), ("float32", 0.5), ("float64", 0.25),
                                ("bool", True)):  # fmt: skip
                getattr(writer, f"add_{code}")(f"x.{code}", value)
            writer.add_array("x.numbers", [1, 2, 3])
            writer.add_array("x.nested", [[1, 2], [3]])
        elif i == 1:
            writer.add_tensor("w", packed, raw_dtype=gguf.GGMLQuantizationType(blocks.TYPE_ID))
            writer.add_tensor("e", np.stack([packed, packed]), raw_dtype=gguf.GGMLQuantizationType(blocks.TYPE_ID))
            writer.add_tensor("f", np.zeros((3, 5), np.float32))
        else:
            writer.add_uint16("split.no", 0)
            writer.add_uint16("split.count", 2)
            writer.add_type("imatrix")
            writer.add_tensor("w.in_sum2", np.ones((1, 8), np.float32))
            writer.add_tensor("w.counts", np.ones((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append((folder / f"seed{i}").read_bytes())
    return found


def attribute_seeds() -> list[bytes]:
    """Inputs of `attributes_target.h`: plain, with a list of channels, per group with 4 bits, the complete order."""
    found = []
    shapes = ((32, 4, 0, 8), (64, 8, 9, 8), (16, 16, 3, 0x14), (128, 32, 2048, 8), (37, 3, 2, 8), (23, 5, 1, 0x28))
    for rows, groups, listed, activation in shapes:
        columns = 64 * groups
        listed = min(listed, blocks.listable(rows, columns))
        body = bytes(range(8, 120, 7)) + bytes(i % 3 for i in range(columns // 64))
        if listed:
            body += (
                struct.pack("<H", listed)
                + np.random.default_rng(1).permutation(columns)[:listed].astype("<u2").tobytes()
            )
        header = struct.pack("<BBBBfII", 0xA4, 1, activation, listed > 0, 0.5, zlib.crc32(body), len(body))
        found.append(bytes([rows - 1, groups - 1, 0]) + header + body)
    return found


def attribute_stream(data: bytes) -> tuple[np.ndarray, int, int]:
    """Stream, rows and columns that `attributes_target.h` makes of an input of at least 3 bytes."""
    rows, columns = data[0] % 128 + 1, 64 * (data[1] % 32 + 1)
    size = blocks.stream_bytes(rows, columns)
    stream = bytearray(data[3 : 3 + size].ljust(size, b"\0"))
    length = int.from_bytes(stream[12:16], "little")
    if data[2] & 1 and len(stream) >= 16 and length <= len(stream) - 16:
        stream[8:12] = struct.pack("<I", zlib.crc32(stream[16 : 16 + length]))
    return np.frombuffer(bytes(stream), np.uint8), rows, columns
