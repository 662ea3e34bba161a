"""Keeps the finished parts of a long quantization beside the output, so that `--resume` can skip them.

The folder `.NAME.resume` holds a file for each finished part, and `key.txt`: a digest of everything that decides the
result (the source, the text, the options, the version of this program). If the key differs, the folder is emptied, so
that no part of another model gets into the output. A file gets its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError, OutputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.matrix.quantize import QuantizedMatrix
from agq_gguf.matrix.stock_feedback import QuantizedStock
from agq_gguf.matrix.typed import Quantized


class Journal:
    """Arrays on disk, by name. Without a folder it stores nothing. `stays`: `close` leaves them."""

    def __init__(self, folder: Path | None, key: str = "", *, stays: bool = False) -> None:
        self._folder, self._stays = folder, stays
        if folder is None:
            return
        try:
            if not (folder / "key.txt").is_file() or (folder / "key.txt").read_text("ascii") != key:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / "key.txt").write_text(key, "ascii")
        except OSError as e:
            raise OutputError(f"{folder}: cannot store the finished parts for --resume: {e.strerror}") from e

    def _path(self, folder: Path, name: str) -> Path:
        return folder / (hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32] + ".npz")

    def has(self, names: Iterable[str]) -> bool:
        """Whether arrays are stored under each of the names."""
        return self._folder is not None and all(self._path(self._folder, name).is_file() for name in names)

    def get(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The arrays stored under this name; None if there are none or they cannot be read."""
        if self._folder is None:
            return None
        try:
            with self._path(self._folder, name).open("rb") as file, np.load(file, allow_pickle=False) as data:
                return {key: data[key] for key in data.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, name: str, arrays: dict[str, Any]) -> None:
        """Stores arrays under a name. Raises OutputError if they cannot be written."""
        if self._folder is None:
            return
        path = self._path(self._folder, name)
        temporary = path.with_name(f"{secrets.token_hex(4)}.part")
        try:
            with temporary.open("xb") as file:
                np.savez(file, **arrays)
            temporary.replace(path)
        except OSError as e:
            raise OutputError(f"{self._folder}: cannot be written: {e.strerror}") from e
        finally:
            temporary.unlink(missing_ok=True)

    def get_matrix(self, name: str) -> Quantized | None:
        """Like `get`, for a matrix stored by `put_matrix`."""
        found = self.get(name)
        try:
            if found is None:
                return None
            type_name, packed = str(found["type"]), found["packed"]
            error, note = float(found["error"]), str(found["note"])
            if type_name != blocks.TYPE_NAME:
                return QuantizedStock(type_name, packed, error, note)
            return QuantizedMatrix(blocks.unpack(packed), error, note)
        except (KeyError, FormatError):
            return None

    def put_matrix(self, name: str, result: Quantized) -> None:
        """Like `put`, for a matrix."""
        if self._folder is not None:
            type_name = result.type_name if isinstance(result, QuantizedStock) else blocks.TYPE_NAME
            kept = {"type": np.str_(type_name), "error": np.float64(result.error), "note": np.str_(result.note)}
            self.put(name, {"packed": result.packed, **kept})

    def close(self) -> None:
        """Removes the folder, because the output is complete."""
        if self._folder is not None and not self._stays:
            shutil.rmtree(self._folder, ignore_errors=True)


def folder_of(target: Path) -> Path:
    """The folder for the finished parts of an output."""
    return target.with_name(f".{target.name}.resume")


def digest(reader: Reader, tokens: Iterable[NDArray[np.int32]], options: str) -> str:
    """SHA-256 over the tensors of the source, the tokens of the text and the options."""
    sha = hashlib.sha256(options.encode())
    for chunk in tokens:
        sha.update(len(chunk).to_bytes(8, "little") + chunk.tobytes())
    for tensor in reader.tensors.values():
        sha.update(f"{tensor.name}:{tensor.type_name}:{tensor.shape}".encode("utf-8", "surrogateescape"))
        for part in reader.chunks(tensor.name):
            sha.update(part)
    return sha.hexdigest()
