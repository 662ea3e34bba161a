"""Writes GGUF files, tensor by tensor, into temporary files that get their final names when all data is written.

The metadata stores a digest of each tensor, so that `verify` can later check that the file is still what was written.
Large models can be split into several files.
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

# Alignment of files with AGQ4: one cache line, so that tiles of a mapped file begin on a cache line. Other files have
# the default alignment, because llama.cpp's quantizer writes damaged files from sources with another one.
ALIGNMENT = 64
_NO_HASH = "0" * 64

Value = str | bool | int | float | np.generic | Sequence[str] | NDArray[Any]
_ARRAY_TYPES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


def encode_value(value: Value) -> bytes:
    """Bytes of a metadata value with its type.

    Types are string, bool, u32 (u64 if needed), f32, array of strings, and array of numbers. Numpy arrays and scalars
    keep their numpy type.
    """
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
    """Places tensors (name, type name, shape) one after another; offsets count from the beginning of the data section.

    `alignment` 0 means the alignment that these tensors need.
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
    """SHA-256, in hexadecimal, of a model's metadata and of the names, types and shapes of its tensors.

    `metadata` maps keys to encoded values. Keys of digests, of the split and of the alignment are left out, so the
    digest does not depend on the number of files.
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
    """The header entry of a tensor."""
    shape = tuple(reversed(tensor.shape))
    about = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, TYPE_IDS[tensor.type_name], tensor.offset)
    return _text(tensor.name) + about


def _size(metadata: Mapping[str, bytes]) -> int:
    """Bytes of a header without tensors."""
    return 24 + sum(len(_text(key)) + len(raw) for key, raw in metadata.items())


class _File:
    """A file that is being written: a temporary file, locked while this process lives."""

    def __init__(self, path: Path, values: dict[str, bytes], tensors: list[Tensor], alignment: int) -> None:
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
            self._file.close()  # another process removed it as abandoned before it was locked
        self.write_header()
        os.ftruncate(self._file.fileno(), self.n_bytes)

    def write_header(self) -> None:
        """Writes the current metadata and offsets; their length never changes."""
        self.write(0, self._header())

    def write(self, at: int, data: memoryview | bytes) -> None:
        """Writes bytes at an offset of the file."""
        assert self._file is not None
        self._file.seek(at)
        self._file.write(data)

    def sync(self) -> None:
        """Flushes all bytes to the disk and closes the file."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def rename(self) -> None:
        """Gives the file its final name."""
        self._temporary.replace(self.path)
        self._renamed = True

    def discard(self) -> None:
        """Removes the file."""
        if self._renamed:  # one part of a split model whose other parts failed
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            with suppress(OSError):  # on a full disk, flushing the rest of the buffer fails again
                self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def _remove_dead(path: Path) -> None:
    """Removes temporary files that a killed process left behind: those that no process has locked."""
    if fcntl is None:
        return
    for candidate in path.parent.glob(f".{_escaped(_short(path.name))}.????????.part"):
        with suppress(OSError), candidate.open("r+b") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            candidate.unlink()


def _sync_folder(folder: Path) -> None:
    """Flushes a folder to the disk, so that new names survive a power failure, if the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _short(name: str) -> str:
    """A shortened name, so that the name of the temporary file is not too long."""
    return name[:48]


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _cut(tensors: list[Tensor], split: int, metadata: tuple[int, int], alignment: int) -> list[list[Tensor]]:
    """The tensors of each file: as many as fit into `split` bytes, but at least one; 0: all in one file.

    `metadata` holds the sizes of the headers without tensors, of the first file and of each further file.
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


def through_links(path: str | os.PathLike[str]) -> Path:
    """The file that a symbolic link names, so that writing replaces that file and not the link; else the path.

    Raises OutputError for links that lead in a circle.
    """
    target = Path(path)
    try:
        return target.resolve() if target.is_symlink() else target
    except RuntimeError as e:
        raise OutputError(f"{path}: is a symbolic link that leads in a circle; give another name") from e
    except OSError as e:  # a name that is too long, for example
        raise OutputError(f"{path}: cannot write there: {e.strerror}") from e


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OutputError if no file can be made where `path` will be written, before hours of work."""
    target = through_links(path)
    probe = target.with_name(f".{_short(target.name)}.{secrets.token_hex(4)}.part")
    try:
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as e:
        raise OutputError(f"{path}: cannot write there: {e.strerror}") from e


class Writer:
    """Writes a model into one GGUF file or several; a context manager.

    The target appears only if the block ends without an error and every tensor was written; otherwise all files are
    removed. Tensors may be written in any order. Raises OutputError if a file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: dict[str, Field],
        added: Mapping[str, Value],
        tensors: list[Tensor],
        *,
        split: int = 0,
    ) -> None:
        """Entries of `metadata` are copied unchanged, unless `added` has the key; keys of a split are left out.

        With `split` > 0 files have at most so many bytes (but at least one tensor) and are called
        NAME-00001-of-0000N.gguf, unless one file is enough.
        """
        self.path = through_links(path)
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
            raise OutputError(
                f"{self.path}: can have at most {MAX_PARTS} files, got {len(parts)}; choose a larger --split-max-size"
            )
        self._files = [_File(*part, alignment) for part in self._split(values, parts)]
        self._place = {tensor.name: (file, tensor) for file in self._files for tensor in file.tensors}
        self.n_bytes = sum(file.n_bytes for file in self._files)
        try:
            for file in self._files:
                if file.path.is_dir():
                    raise OutputError(f"{file.path}: is a folder; give the name of a file")
                if file.path.exists() and not file.path.is_file():
                    # A device or a pipe cannot be written out of order, and would be replaced by a file.
                    raise OutputError(f"{file.path}: exists and is not a regular file; give another name")
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
        """The files to write; programs open the first one."""
        return [file.path for file in self._files]

    def _split(
        self, values: dict[str, bytes], parts: list[list[Tensor]]
    ) -> Iterable[tuple[Path, dict[str, bytes], list[Tensor]]]:
        """Path, metadata and tensors of each file. As in llama.cpp's own splits, the first file has the metadata."""
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
        """Raises OutputError if the disk is too full, before hours of work."""
        try:
            free = shutil.disk_usage(self.path.parent).free
        except OSError:
            return
        if free < self.n_bytes:
            raise OutputError(
                f"{self.path}: cannot be written: {self.n_bytes} bytes are needed, {free} are free there; make room"
            )

    def write(self, name: str, parts: Iterable[NDArray[Any] | memoryview]) -> None:
        """Writes the bytes of one tensor, given in parts."""
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
            raise ValueError(f"tensor {name} needs {tensor.n_bytes} bytes, got {written}")
        self._digests[name] = digest.hexdigest()

    def replace(self, key: str, value: Value) -> None:
        """Replaces the value of a key of `added`, for values known only at the end; the new one must be as long."""
        raw, values = encode_value(value), self._files[0].values
        if len(raw) != len(values[key]):
            raise ValueError(f"metadata {key} needs {len(values[key])} bytes, got {len(raw)}")
        values[key] = raw

    def _hashes(self) -> bytes:
        return encode_value([self._digests[tensor.name] for tensor in self._tensors])

    def _explain(self, e: BaseException) -> None:
        if isinstance(e, OSError):
            raise OutputError(f"{self.path}: cannot be written: {e.strerror}; incomplete files were removed") from e

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
            # Programs open the first part. It must never exist beside parts of another run, even if we are killed.
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
