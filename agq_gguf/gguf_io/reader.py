"""Reads GGUF files: checks an untrusted header and gives access to one tensor at a time.

The header is not parsed by `gguf.GGUFReader`, for two reasons: that class trusts every count and length, and it does
not keep the bytes of a metadata value, which a converter must copy unchanged.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.kinds import what_it_is

ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NAME = 63  # bytes, as in ggml
_MAX_NESTING = 4
_HEAD = 1024  # bytes that tell what a file is
_CHUNK = 1 << 24  # bytes that are copied at one time

# Metadata value types of GGUF: code -> struct format.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types: id -> (name, elements per block, bytes per block).
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36), 10: ("q2_K", 256, 84), 11: ("q3_K", 256, 110),
    12: ("q4_K", 256, 144), 13: ("q5_K", 256, 176), 14: ("q6_K", 256, 210), 15: ("q8_K", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66),
    blocks.TYPE_ID: (blocks.TYPE_NAME, blocks.GROUP_COLUMNS, blocks.BLOCK_BYTES),
    39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18),
}  # fmt: skip
TYPE_IDS = {name: number for number, (name, _, _) in TYPES.items()}
FLOATS = ("f32", "f16", "bf16")
_PLAIN = {*FLOATS, "f64", "i8", "i16", "i32", "i64"}


@dataclass(frozen=True)
class Field:
    """One metadata entry: its value, and its bytes in the file (type and value)."""

    value: Any
    raw: bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `shape` is in numpy order, rows before columns (GGUF lists the columns first)."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Weights in the tensor."""
        return math.prod(self.shape)

    @property
    def n_matrices(self) -> int:
        """Matrices in the tensor: one for each expert, or one if there are no experts."""
        return math.prod(self.shape[:-2])

    @property
    def quantized(self) -> bool:
        """Whether its type stores blocks of weights that share a scale."""
        return self.type_name not in _PLAIN


def decode_text(raw: bytes) -> str:
    """Text of a GGUF string; `encode_text` restores its bytes, even if they are not UTF-8."""
    return raw.decode("utf-8", "surrogateescape")


def encode_text(text: str) -> bytes:
    """Bytes of a GGUF string."""
    return text.encode("utf-8", "surrogateescape")


class _Cursor:
    """Reads values from a file one after another, and raises InputError at its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.what = data, path, 0, "the header"

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise InputError(f"{self.path}: the file ends inside {self.what}; it is truncated or damaged")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return decode_text(self.take(self.number("Q")))

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise InputError(f"{self.path}: {self.what} has the unknown type {kind}; the file is damaged or too new")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            return np.frombuffer(self.take(count * struct.calcsize("<" + _SCALARS[item])), "<" + _SCALARS[item])
        if count > len(self.data) - self.at:  # each item needs at least one byte, so `take` raises
            self.take(count)
        return [self.value(item, depth + 1) for _ in range(count)]


@dataclass
class Reader:
    """An open GGUF file, made by `open_gguf`. Use it as a context manager or call `close`.

    Arrays from `read` remain valid after the file is closed; those from `raw` do not.
    """

    path: Path
    metadata: dict[str, Field]
    tensors: dict[str, Tensor]  # in the order of the file
    _map: mmap.mmap = field(repr=False)
    _file: IO[bytes] = field(repr=False)
    _identity: tuple[int, ...] = field(repr=False)
    _lock: threading.Lock = field(repr=False, default_factory=threading.Lock)
    # Quantized type -> what turns whole blocks of it into float32 [n]; `read` refuses types without an entry.
    decoders: dict[str, Callable[[bytearray], NDArray[np.float32]]] = field(repr=False, default_factory=dict)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture; '' if the file has none."""
        return str(self.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a metadata key."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    def number(self, key: str, default: float) -> float:
        """A metadata key that is a single finite number. Raises InputError if it is anything else."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._unlike(key, value, "a number")
        return float(value) if isinstance(value, float) else int(value)

    def flag(self, key: str, default: bool) -> bool:
        """A metadata key that is true or false. Raises InputError if it is anything else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._unlike(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A metadata key that is a text. Raises InputError if it is anything else."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self._unlike(key, value, "a text")
        return value

    def _unlike(self, key: str, value: Any, wanted: str) -> InputError:
        return InputError(f"{self.path}: {key} must be {wanted}, got {str(value)[:60]}; the file is damaged")

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor, mapped from the file; for reading a few of them."""
        tensor = self.tensors[name]
        return memoryview(self._map)[tensor.offset : tensor.offset + tensor.n_bytes]

    def matrices(self, name: str) -> NDArray[np.uint8]:
        """The stored rows of a tensor, uint8 [experts, rows, bytes per row], mapped from the file like `raw`.

        Raises FormatError for a one-dimensional tensor.
        """
        tensor = self.tensors[name]
        if len(tensor.shape) < 2:
            raise FormatError(f"an AGQ4 tensor must have at least 2 dimensions, got shape {tensor.shape}")
        return np.frombuffer(self.raw(name), np.uint8).reshape(tensor.n_matrices, tensor.shape[-2], -1)

    def parameters(self, name: str) -> blocks.Parameters:
        """The parameters in the attribute stream of an AGQ4 tensor; with experts, those of the first one.

        Reads only the pages with attributes. Raises FormatError, which names the file and the tensor.
        """
        try:
            return blocks.read_parameters(self.matrices(name)[0])
        except FormatError as e:
            raise FormatError(f"{self.path}: tensor {name}: {e}") from e

    def read_bytes(self, name: str, begin: int, end: int) -> bytearray:
        """Bytes `begin` to `end` of a tensor, read from the file.

        Raises InputError if the disk fails or the file was truncated. With a mapping the system would kill the process.
        """
        tensor = self.tensors[name]
        data = bytearray(end - begin)
        view, done = memoryview(data), 0
        try:
            with self._lock:
                self._file.seek(tensor.offset + begin)
                while done < len(data):
                    n = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                    if not n:
                        raise InputError(
                            f"{self.path}: tensor {name} is cut off: the file was changed while it was read; try again"
                        )
                    done += n
        except OSError as e:
            raise InputError(f"{self.path}: tensor {name} cannot be read: {e.strerror}") from e
        return data

    def chunks(self, name: str) -> Iterator[memoryview]:
        """All bytes of a tensor, in parts of some megabytes. Raises InputError like `read_bytes`."""
        n_bytes = self.tensors[name].n_bytes
        for begin in range(0, n_bytes, _CHUNK):
            yield memoryview(self.read_bytes(name, begin, min(begin + _CHUNK, n_bytes)))

    def read(self, name: str, rows: range | None = None) -> NDArray[np.float32]:
        """A float tensor (f32, f16, bf16) as float32 in its shape, or some rows of it [rows, K]; always a copy.

        Rows are counted through all matrices of the tensor. Quantized types need an entry of `decoders`. Raises
        InputError for other types.
        """
        tensor = self.tensors[name]
        decode = self.decoders.get(tensor.type_name)
        if tensor.type_name not in FLOATS and decode is None:
            raise InputError(f"{self.path}: tensor {name} must be f32, f16 or bf16, got {tensor.type_name}")
        shape, begin, end = tensor.shape, 0, tensor.n_bytes
        if rows is not None:
            row_bytes = tensor.n_bytes // math.prod(shape[:-1])
            begin, end = rows.start * row_bytes, rows.stop * row_bytes
            shape = (len(rows), shape[-1])
        data = self.read_bytes(name, begin, end)
        if decode is not None:
            return decode(data).reshape(shape)
        if tensor.type_name == "f32":
            values = np.frombuffer(data, "<f4").astype(np.float32)
        elif tensor.type_name == "f16":
            values = np.frombuffer(data, "<f2").astype(np.float32)
        else:
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return values.reshape(shape)

    def check_unchanged(self) -> None:
        """Raises InputError if the file was written to, truncated, replaced or removed since it was opened."""
        try:
            now = (_identity(os.fstat(self._file.fileno())), _identity(self.path.stat()))
        except OSError as e:
            raise InputError(f"{self.path}: was removed while it was read: {e.strerror}") from e
        if now != (self._identity, self._identity):
            raise InputError(
                f"{self.path}: was changed while it was read, so the result would mix two models; try again"
            )

    def close(self) -> None:
        """Closes the file."""
        # An error on its way may hold views of the mapping in its traceback; it matters more, and frees them later.
        with suppress(BufferError):
            self._map.close()
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_gguf(path: str | os.PathLike[str]) -> Reader:
    """Opens a GGUF file with tensors of any type, including AGQ4, and checks its whole header.

    Raises InputError, which names the file and the tensor, if the file is missing, is not GGUF, is truncated, or states
    sizes that exceed it. Opens a part of a split model alone; `shards.open_model` joins the parts.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        raise InputError(
            f"{path}: is a Hugging Face checkpoint; `agq-gguf quantize` takes its folder, everything else a GGUF file"
        )
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a GGUF file")
    try:
        file = path.open("rb", buffering=0)
    except OSError as e:
        raise InputError(f"{path}: cannot be opened: {e.strerror}") from e
    mapped = None
    try:
        status = os.fstat(file.fileno())
        if status.st_size < 24:
            raise InputError(f"{path}: too short to be a GGUF file")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        metadata, tensors = _parse(mapped, path)
        return Reader(path, metadata, tensors, mapped, file, _identity(status))
    except BaseException as e:
        if mapped is not None:
            mapped.close()
        file.close()
        if isinstance(e, OSError):
            raise InputError(f"{path}: cannot be opened: {e.strerror}") from e
        raise


def check_source(reader: Reader, *, allow_requantize: bool = False, option: str = "") -> None:
    """Raises InputError unless the file is a whole model with float weights.

    With `allow_requantize` the weights may be of any type but AGQ4. `option` is the command's option for that.
    """
    if reader.number("split.count", 0) not in (0, 1):
        raise InputError(f"{reader.path}: is one part of a split model; all parts are needed")
    kind = reader.text("general.type", "model")
    if kind == "mmproj" or reader.architecture == "clip":
        raise InputError(
            f"{reader.path}: the vision or audio part of a model (mmproj) is not quantized; quantize the language "
            "model, and give this file to llama.cpp unchanged"
        )
    if kind == "adapter":
        raise InputError(
            f"{reader.path}: a LoRA adapter is not quantized; quantize the model that it belongs to, and load the "
            "adapter on top"
        )
    if kind != "model":
        raise InputError(f"{reader.path}: general.type must be 'model', got {kind!r}; use a language model")
    if not reader.architecture:
        raise InputError(f"{reader.path}: has no general.architecture, so it is not a model")
    if not reader.tensors:
        raise InputError(f"{reader.path}: holds no tensors")
    if any(tensor.type_name == blocks.TYPE_NAME for tensor in reader.tensors.values()):
        raise InputError(f"{reader.path}: is an AGQ4 model already; start from the file that it was made from")
    for tensor in reader.tensors.values():
        if tensor.quantized and not allow_requantize:
            raise InputError(
                f"{reader.path}: tensor {tensor.name} is already quantized ({tensor.type_name}); start from the F32, "
                f"F16 or BF16 file of the model{f', or use {option}, which loses quality' if option else ''}"
            )


def _parse(data: mmap.mmap, path: Path) -> tuple[dict[str, Field], dict[str, Tensor]]:
    cursor = _Cursor(data, path)
    if cursor.take(4) != b"GGUF":
        found = what_it_is(data[:_HEAD], len(data))
        if found:
            raise InputError(f"{path}: is {found}")
        raise InputError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise InputError(f"{path}: a big-endian GGUF file; convert it with gguf-convert-endian first")
    if version not in (2, 3):
        raise InputError(f"{path}: GGUF version must be 2 or 3, got {version}")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")

    metadata: dict[str, Field] = {}
    for _ in range(n_fields):
        cursor.what = "the metadata"
        key = cursor.string()
        cursor.what = f"the metadata key {key[:80]!r}"
        if key in metadata:
            raise InputError(f"{path}: {cursor.what} occurs twice")
        begin = cursor.at
        value = cursor.value(cursor.number("I"))
        metadata[key] = Field(value, data[begin : cursor.at])

    infos = [_parse_tensor_info(cursor) for _ in range(_checked_count(cursor, n_tensors))]
    alignment = metadata[ALIGNMENT_KEY].value if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path}: {ALIGNMENT_KEY} must be a power of two, got {alignment!r}; the file is damaged")
    data_begin = -(-cursor.at // alignment) * alignment

    tensors: dict[str, Tensor] = {}
    for name, type_name, shape, offset, n_bytes in infos:
        if name in tensors:
            raise InputError(f"{path}: tensor {name} occurs twice")
        if offset % alignment:
            raise InputError(
                f"{path}: tensor {name} must begin at a multiple of {alignment}, got {offset}; the file is damaged"
            )
        if data_begin + offset + n_bytes > len(data):
            raise InputError(
                f"{path}: tensor {name} needs {n_bytes} bytes at {data_begin + offset}, but the file has {len(data)}; "
                "it is truncated: download or convert it again"
            )
        tensors[name] = Tensor(name, type_name, shape, data_begin + offset, n_bytes)
    return metadata, tensors


def _checked_count(cursor: _Cursor, n_tensors: int) -> int:
    cursor.what = "the list of tensors"
    if n_tensors > len(cursor.data) // 24:  # bytes of the smallest entry
        cursor.take(24 * n_tensors)
    return n_tensors


def _parse_tensor_info(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape (rows first), offset in the data section, bytes."""
    cursor.what = "the list of tensors"
    path, name = cursor.path, cursor.string()
    if not name or len(encode_text(name)) > _MAX_NAME:
        raise InputError(
            f"{path}: a tensor name must have 1 to {_MAX_NAME} bytes, got {len(encode_text(name))}; the file is damaged"
        )
    n_dims = cursor.number("I")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise InputError(
            f"{path}: tensor {name} must have 1 to {_MAX_DIMENSIONS} dimensions, got {n_dims}; the file is damaged"
        )
    sizes = [cursor.number("Q") for _ in range(n_dims)]
    type_id, offset = cursor.number("I"), cursor.number("Q")
    if type_id not in TYPES:
        raise InputError(f"{path}: tensor {name} has the unknown type {type_id}; the file is damaged or too new")
    type_name, block, block_bytes = TYPES[type_id]
    if any(size == 0 for size in sizes) or sizes[0] % block:
        raise InputError(
            f"{path}: tensor {name} of type {type_name} cannot have the shape {sizes}; the file is damaged"
        )
    return name, type_name, tuple(reversed(sizes)), offset, math.prod(sizes) // block * block_bytes
