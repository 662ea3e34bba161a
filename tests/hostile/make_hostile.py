"""Writes the files in this folder that were made by hand: each is small and asks for something enormous or endless.

What a fuzzer finds is added as it is, under a name that says what was wrong.
"""

from __future__ import annotations

import struct
from pathlib import Path

HERE = Path(__file__).parent


def text(value: bytes) -> bytes:
    """A GGUF string."""
    return struct.pack("<Q", len(value)) + value


def header(tensors: int, fields: int) -> bytes:
    """The beginning of a file."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """An entry of the list of tensors."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind: int, count: int) -> bytes:
    """Type and beginning of an array."""
    return struct.pack("<IIQ", 9, kind, count)


PLAIN = bytes(range(8, 120, 7)) + bytes(2)  # codebook, exponents of 128 columns


def stream(flags: int, parameters: bytes, length: int | None = None) -> bytes:
    """An input of `tests/fuzz/attributes_target.h`: 128 x 128, with a checksum that fits."""
    length = len(parameters) if length is None else length
    return bytes([127, 1, 1]) + struct.pack("<BBBBfII", 0xA4, 1, 8, flags, 1.0, 0, length) + parameters


FILES = {
    "array-of-2-to-the-62.gguf": header(0, 1) + text(b"a") + array(4, 2**62) + bytes(64),
    "array-of-strings-beyond-the-file.gguf": header(0, 1) + text(b"a") + array(8, 2**40) + text(b"x") * 8,
    "arrays-nested-a-thousand-times.gguf": header(0, 1) + text(b"a") + struct.pack("<I", 9)
    + struct.pack("<IQ", 9, 1) * 1000,
    "name-of-2-to-the-63.gguf": header(0, 1) + struct.pack("<Q", 2**63) + bytes(64),
    "tensors-without-end.gguf": header(2**64 - 1, 0) + bytes(64),
    "fields-without-end.gguf": header(0, 2**64 - 1) + text(b"a") + struct.pack("<IB", 0, 1),
    "tensor-of-2-to-the-250.gguf": header(1, 0) + tensor(b"w", (2**62, 2**62, 2**62, 2**62), 0, 0) + bytes(128),
    "tensor-beyond-the-file.gguf": header(1, 0) + tensor(b"w", (32,), 0, 2**63 - 32) + bytes(128),
    "alignment-of-zero.gguf": header(1, 1) + text(b"general.alignment") + struct.pack("<II", 4, 0)
    + tensor(b"w", (1,), 0, 0) + bytes(64),
    "alignment-of-2-to-the-31.gguf": header(1, 1) + text(b"general.alignment") + struct.pack("<II", 4, 2**31)
    + tensor(b"w", (1,), 0, 0) + bytes(64),
    "length-beyond-the-stream.stream": stream(0, b"", 2**32 - 1),
    "channels-beyond-the-columns.stream": stream(1, PLAIN + struct.pack("<HHH", 2, 0, 255)),
    "channel-twice.stream": stream(1, PLAIN + struct.pack("<HHH", 2, 5, 5)),
    "more-channels-than-bytes.stream": stream(1, PLAIN + struct.pack("<HH", 65535, 5)),
}  # fmt: skip

if __name__ == "__main__":
    for name, data in FILES.items():
        (HERE / name).write_bytes(data)
