"""GGUF out: tensor by tensor into temporary files beside the target, which take their names when all is written.

A digest of each tensor is kept while it is written and stored in the metadata, so that `verify` can tell years later
whether the file is still what was written. Large models can be cut into several files.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import OutputError
from agq_gguf.format.blocks import TYPE_NAME
from agq_gguf.gguf_io.metadata import HASH_PREFIX, METADATA_HASH, TENSOR_HASHES
from agq_gguf.gguf_io.reader import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, TYPE_IDS, TYPES, Field, Tensor, encode_text
from agq_gguf.gguf_io.shards import MAX_PARTS, part_path

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

ALIGNMENT = 64  # of files with AGQ4, a cache line: tiles of a mapped file then begin on one. Of others it is the
# default, because llama.cpp's quantizer writes damaged files from sources with another one.
_NO_HASH = "0" * 64

Value = str | bool | int | float | np.generic | Sequence[str] | NDArray[Any]
_ARRAY_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


def encode_value(value: Value) -> bytes:
    """A metadata value with its type: string, bool, u32 (u64 where needed), f32; an array of texts, or one of numbers
    with the type that it has in numpy (a numpy scalar is a number of that type)."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, np.generic) and not isinstance(value, float):
        return struct.pack("<I", _ARRAY_TYPES[value.dtype.str[1:]]) + value.tobytes()
    if isinstance(value, np.ndarray):
        kind = _ARRAY_TYPES[value.dtype.str[1:]]
        return struct.pack("<IIQ", 9, kind, value.size) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, Sequence):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value < 2**32 else struct.pack("<IQ", 10, value)
    return struct.pack("<If", 6, value)


def _text(text: str) -> bytes:
    raw = encode_text(text)
    return struct.pack("<Q", len(raw)) + raw


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = 0) -> list[Tensor]:
    """Places (name, type name, shape) one behind the other; offsets count from the beginning of the data section.

    `alignment` 0 is what these tensors want.
    """
    found = list(tensors)
    alignment = alignment or _wanted_alignment(type_name for _, type_name, _ in found)
    placed, offset = [], 0
    for name, type_name, shape in found:
        _, block, block_bytes = TYPES[TYPE_IDS[type_name]]
        n_bytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        placed.append(Tensor(name, type_name, shape, offset, n_bytes))
        offset += _padded(n_bytes, alignment)
    return placed


def _wanted_alignment(type_names: Iterable[str]) -> int:
    return ALIGNMENT if TYPE_NAME in type_names else DEFAULT_ALIGNMENT


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def metadata_digest(metadata: Mapping[str, bytes], tensors: Iterable[Tensor]) -> str:
    """SHA-256, in hexadecimal, of what a model is besides its weights.

    `metadata` maps keys to encoded values; those of digests, of the split and the alignment do not count, so the
    digest is that of the model, however many files it is in.
    """
    digest = hashlib.sha256()
    for key in sorted(metadata):
        if not key.startswith((HASH_PREFIX, "split.")) and key != ALIGNMENT_KEY:
            digest.update(_text(key) + metadata[key])
    for tensor in tensors:
        digest.update(
            _text(tensor.name) + _text(tensor.type_name) + struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        )
    return digest.hexdigest()


def _entry(tensor: Tensor) -> bytes:
    """What the header says of a tensor."""
    shape = tuple(reversed(tensor.shape))
    about = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, TYPE_IDS[tensor.type_name], tensor.offset)
    return _text(tensor.name) + about


def _size(metadata: Mapping[str, bytes]) -> int:
    """Bytes of a header without tensors."""
    return 24 + sum(len(_text(key)) + len(raw) for key, raw in metadata.items())


class _File:
    """One file in the making: a temporary one that is locked as long as this process lives."""

    def __init__(self, path: Path, values: dict[str, bytes], tensors: list[Tensor], alignment: int):
        self.path, self.values, self._alignment = path, values, alignment
        self.tensors = layout(((tensor.name, tensor.type_name, tensor.shape) for tensor in tensors), alignment)
        self.data_begin = len(self._header())
        last = max((t.offset + t.n_bytes for t in self.tensors), default=0)
        self.n_bytes = self.data_begin + _padded(last, alignment)
        self._temporary = path.with_name(f".{_short(path.name)}.{secrets.token_hex(4)}.part")
        self._file: IO[bytes] | None = None
        self._renamed = False

    def _header(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.values))]
        for key, raw in self.values.items():
            parts += [_text(key), raw]
        header = b"".join([*parts, *map(_entry, self.tensors)])
        return header + bytes(-len(header) % self._alignment)

    def open(self) -> None:
        """Creates the file in its full size."""
        _remove_dead(self.path)
        while True:
            self._file = self._temporary.open("xb")
            if fcntl is None:
                break
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()  # another process took it for a dead one before it was locked
        self.write_header()
        os.ftruncate(self._file.fileno(), self.n_bytes)

    def write_header(self) -> None:
        """Writes metadata and places as they are now; their length never changes."""
        self.write(0, self._header())

    def write(self, at: int, data: memoryview | bytes) -> None:
        """Writes bytes at a place of the file."""
        assert self._file is not None
        self._file.seek(at)
        self._file.write(data)

    def sync(self) -> None:
        """All bytes are on the disk when this returns."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def rename(self) -> None:
        """From here on the file is there under its name."""
        self._temporary.replace(self.path)
        self._renamed = True

    def discard(self) -> None:
        """Leaves nothing behind."""
        if self._renamed:  # a part of a set that did not get complete
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            with suppress(OSError):  # a full disk shows again when the rest of the buffer is flushed
                self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _remove_dead(path: Path) -> None:
    """Removes what a process that was killed left of an earlier try: temporary files that nobody holds a lock on."""
    if fcntl is None:
        return
    for candidate in path.parent.glob(f".{_escaped(_short(path.name))}.????????.part"):
        with suppress(OSError), candidate.open("r+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            candidate.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes new names last through a power failure, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _short(name: str) -> str:
    """A name of a temporary file must not be too long where that of the target is not."""
    return name[:48]


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _cut(tensors: list[Tensor], split: int, metadata: tuple[int, int], alignment: int) -> list[list[Tensor]]:
    """Tensors of each file: as many as fit into one of `split` bytes, at least one; 0: all in one file.

    `metadata` is the size of the header without tensors, of the first file and of each other.
    """
    if not split:
        return [tensors]
    parts: list[list[Tensor]] = []
    room = -1
    for tensor in tensors:
        size = len(_entry(tensor)) + _padded(tensor.n_bytes, alignment)
        if size > room:
            room = split - metadata[bool(parts)] - (alignment - 1)  # the header is padded, too
            parts.append([])
        parts[-1].append(tensor)
        room -= size
    return parts


class Writer:
    """Writes one model, in one GGUF file or several; a context manager.

    The target appears only when the block ends without an error and every tensor was written; otherwise nothing is left
    behind. Tensors may come in any order. Raises OutputError for whatever the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: dict[str, Field],
        added: Mapping[str, Value],
        tensors: list[Tensor],
        *,
        split: int = 0,
    ):
        """`metadata` keeps its bytes and its place unless `added` has the key; keys of a split are left out.

        With `split` > 0 files have at most so many bytes (but one tensor at least) and are called
        NAME-00001-of-0000N.gguf, unless one is enough.
        """
        self.path = Path(path)
        self._tensors = tensors
        self._missing = {tensor.name for tensor in tensors}
        self._digests = {tensor.name: _NO_HASH for tensor in tensors}
        values = {key: found.raw for key, found in metadata.items() if not key.startswith("split.")}
        values |= {key: encode_value(value) for key, value in added.items()}
        alignment = _wanted_alignment(tensor.type_name for tensor in tensors)
        if alignment == DEFAULT_ALIGNMENT:
            values.pop(ALIGNMENT_KEY, None)
        self._alignment_key = {} if alignment == DEFAULT_ALIGNMENT else {ALIGNMENT_KEY: encode_value(alignment)}
        values |= {TENSOR_HASHES: b"", METADATA_HASH: encode_value(_NO_HASH), **self._alignment_key}
        values[TENSOR_HASHES] = self._hashes()
        later = self._metadata_of_part(values, 1, 2)
        parts = _cut(tensors, split, (_size(values | later), _size(later)), alignment)
        if len(parts) > MAX_PARTS:
            raise OutputError(f"{self.path}: would be {len(parts)} files; choose a larger size to split at")
        self._files = [_File(*part, alignment) for part in self._split(values, parts)]
        self._place = {tensor.name: (file, tensor) for file in self._files for tensor in file.tensors}
        self.n_bytes = sum(file.n_bytes for file in self._files)
        try:
            for file in self._files:
                if file.path.is_dir():
                    raise OutputError(f"{file.path}: is a folder, wanted a file name")
                if file.path.exists() and not file.path.is_file():
                    # A device or a pipe cannot be written in any order, and would be replaced by a file.
                    raise OutputError(f"{file.path}: is there already and no file")
            for file in self._files:
                file.open()
            self._check_room()
        except BaseException as e:
            self._discard()
            if isinstance(e, OSError):
                raise OutputError(f"{self.path}: cannot write there: {e.strerror}") from e
            raise

    @property
    def paths(self) -> list[Path]:
        """The files that are made; the first is what programs open."""
        return [file.path for file in self._files]

    def _split(
        self, values: dict[str, bytes], parts: list[list[Tensor]]
    ) -> Iterable[tuple[Path, dict[str, bytes], list[Tensor]]]:
        """Path, metadata and tensors of each file. As in llama.cpp's own splits, the first has the metadata."""
        if len(parts) == 1:
            return [(self.path, values, parts[0])]
        return [
            (part_path(self.path, i, len(parts)), self._metadata_of_part(values, i, len(parts)), part)
            for i, part in enumerate(parts)
        ]

    def _metadata_of_part(self, values: dict[str, bytes], i: int, n: int) -> dict[str, bytes]:
        keys = {
            "split.no": encode_value(np.uint16(i)),
            "split.count": encode_value(np.uint16(n)),
            "split.tensors.count": encode_value(np.int32(len(self._tensors))),
        }
        return values | keys if i == 0 else {**keys, **self._alignment_key}

    def _check_room(self) -> None:
        """A disk that is too full is better found out now than after hours."""
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError:
            return
        if free < self.n_bytes:
            raise OutputError(f"{self.path}: cannot be written: {self.n_bytes} bytes are needed, {free} are free there")

    def write(self, name: str, parts: Iterable[NDArray[Any] | memoryview]) -> None:
        """Writes the bytes of one tensor, in parts, at its place."""
        file, tensor = self._place[name]
        self._missing.remove(name)
        written, digest = 0, hashlib.sha256()
        for part in parts:
            view = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            written += len(view)
            if written > tensor.n_bytes:
                break
            try:
                file.write(file.data_begin + tensor.offset + written - len(view), view)
            except OSError as e:
                self._explain(e)
                raise
            digest.update(view)
        if written != tensor.n_bytes:
            raise ValueError(f"tensor {name}: {written} bytes, its place has {tensor.n_bytes}")
        self._digests[name] = digest.hexdigest()

    def replace(self, key: str, value: Value) -> None:
        """Gives a key of `added` another value, which must take as many bytes: for what is known only at the end."""
        raw, values = encode_value(value), self._files[0].values
        if len(raw) != len(values[key]):
            raise ValueError(f"metadata {key}: {len(raw)} bytes in place of {len(values[key])}")
        values[key] = raw

    def _hashes(self) -> bytes:
        return encode_value([self._digests[tensor.name] for tensor in self._tensors])

    def _explain(self, e: BaseException) -> None:
        if isinstance(e, OSError):
            raise OutputError(f"{self.path}: cannot be written: {e.strerror}; nothing was left behind") from e

    def _discard(self) -> None:
        for file in self._files:
            file.discard()

    def _finish(self) -> None:
        if self._missing:
            raise ValueError(f"tensors without data: {sorted(self._missing)}")
        values = self._files[0].values
        values[TENSOR_HASHES] = self._hashes()
        values[METADATA_HASH] = encode_value(metadata_digest(values, self._tensors))
        self._files[0].write_header()
        for file in self._files:
            file.sync()
        if len(self._files) > 1:
            # Programs open the first part. It must never stand beside parts of another try, whenever we are killed.
            self._files[0].path.unlink(missing_ok=True)
        for file in reversed(self._files):
            file.rename()
        _sync_folder(self.path.parent)

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
