"""GGUF out: tensor by tensor into a temporary file beside the target, which takes its name when all is written."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import OutputError
from agq_gguf.reader import ALIGNMENT_KEY, TYPE_IDS, TYPES, Field, Tensor, encode_text

ALIGNMENT = 64  # a cache line: tiles of a mapped file then begin on one

_Value = str | bool | int | float


def encode_value(value: _Value) -> bytes:
    """A metadata value with its type: string, bool, u32 (u64 where needed) or f32."""
    if isinstance(value, str):
        text = encode_text(value)
        return struct.pack("<IQ", 8, len(text)) + text
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value < 2**32 else struct.pack("<IQ", 10, value)
    return struct.pack("<If", 6, value)


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[Tensor]:
    """Places (name, type name, shape) one behind the other; offsets count from the beginning of the data section."""
    placed, offset = [], 0
    for name, type_name, shape in tensors:
        _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
        n_bytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        placed.append(Tensor(name, type_name, shape, offset, n_bytes))
        offset += -(-n_bytes // ALIGNMENT) * ALIGNMENT
    return placed


def _header(metadata: dict[str, Field], added: dict[str, _Value], tensors: list[Tensor]) -> bytes:
    """Header and padding. Fields of the source keep their bytes and their place unless `added` has them."""
    added = {**added, ALIGNMENT_KEY: ALIGNMENT}
    values = {key: found.raw for key, found in metadata.items()} | {key: encode_value(v) for key, v in added.items()}
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, raw in values.items():
        name = encode_text(key)
        parts += [struct.pack("<Q", len(name)), name, raw]
    for tensor in tensors:
        name, shape = encode_text(tensor.name), tuple(reversed(tensor.shape))
        parts += [struct.pack("<Q", len(name)), name, struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts.append(struct.pack("<IQ", TYPE_IDS[tensor.type_name], tensor.offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


class Writer:
    """Writes one GGUF file; a context manager.

    The target appears only when the block ends without an error and every tensor was written; otherwise nothing is left
    behind. Tensors may come in any order. Raises OutputError for whatever the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: dict[str, Field],
        added: dict[str, _Value],
        tensors: list[Tensor],
    ):
        self.path = Path(path)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._missing = set(self._tensors)
        header = _header(metadata, added, tensors)
        self._data_begin = len(header)
        last = max((t.offset + t.n_bytes for t in tensors), default=0)
        self.n_bytes = self._data_begin + -(-last // ALIGNMENT) * ALIGNMENT
        if self.path.is_dir():
            raise OutputError(f"{self.path}: is a folder, wanted a file name")
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            self._file: IO[bytes] = self._temporary.open("xb")
        except OSError as e:
            raise OutputError(f"{self.path}: cannot write there: {e.strerror}") from e
        try:
            self._write(0, header)
            os.ftruncate(self._file.fileno(), self.n_bytes)
        except BaseException as e:
            self._discard()
            self._explain(e)
            raise

    def write(self, name: str, parts: Iterable[NDArray[Any] | memoryview]) -> None:
        """Writes the bytes of one tensor, in parts, at its place."""
        tensor = self._tensors[name]
        self._missing.remove(name)
        written = 0
        for part in parts:
            view = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            try:
                self._write(self._data_begin + tensor.offset + written, view)
            except OSError as e:
                self._explain(e)
                raise
            written += len(view)
        if written != tensor.n_bytes:
            raise ValueError(f"tensor {name}: {written} bytes, its place has {tensor.n_bytes}")

    def _write(self, at: int, data: memoryview | bytes) -> None:
        self._file.seek(at)
        self._file.write(data)

    def _explain(self, e: BaseException) -> None:
        if isinstance(e, OSError):
            raise OutputError(f"{self.path}: cannot be written: {e.strerror}; nothing was left behind") from e

    def _discard(self) -> None:
        with suppress(OSError):  # a full disk shows again when the rest of the buffer is flushed
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._missing:
            raise ValueError(f"tensors without data: {sorted(self._missing)}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if e is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException as failure:
            self._discard()
            self._explain(failure)
            raise
