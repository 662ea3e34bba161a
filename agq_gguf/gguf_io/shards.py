"""Reads split models (NAME-00001-of-0000N.gguf) as one, and names their parts.

The other parts are expected beside the given file. Their names follow from its name and the number of parts, so nothing
in a file can point to another place.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from pathlib import Path

from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import Reader, open_gguf

MAX_PARTS = 0xFFFF  # split.count is a 16-bit number
_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_KEYS = ("split.no", "split.count", "split.tensors.count")


def part_path(path: Path, number: int, count: int) -> Path:
    """Path of part `number` (from 0) of a model that would be `path` if it were in one file."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number + 1:05d}-of-{count:05d}.gguf")


class ShardedReader(Reader):
    """Several files as one `Reader`; the metadata is that of the first part, without the keys of the split."""

    def __init__(self, parts: list[Reader]) -> None:
        """Called by `open_model`; closes `parts` when it is closed."""
        first = parts[0]
        metadata = {key: found for key, found in first.metadata.items() if key not in _KEYS}
        tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        super().__init__(first.path, metadata, tensors, first._map, first._file, first._identity)
        self.parts = parts
        self._part_of = {name: part for part in parts for name in part.tensors}

    def raw(self, name: str) -> memoryview:
        """See `Reader.raw`."""
        return self._part_of[name].raw(name)

    def read_bytes(self, name: str, begin: int, end: int) -> bytearray:
        """See `Reader.read_bytes`."""
        return self._part_of[name].read_bytes(name, begin, end)

    def check_unchanged(self) -> None:
        """See `Reader.check_unchanged`."""
        for part in self.parts:
            part.check_unchanged()

    def close(self) -> None:
        """Closes all parts."""
        for part in self.parts:
            part.close()


def paths_of(reader: Reader) -> list[Path]:
    """The files of an open model."""
    return [part.path for part in reader.parts] if isinstance(reader, ShardedReader) else [reader.path]


def open_model(path: str | os.PathLike[str]) -> Reader:
    """Opens a model in one file, or a split model from any of its parts; see `reader.open_gguf`.

    Raises InputError if a part is missing, belongs to another model, or holds a tensor that another part has too.
    """
    with ExitStack() as stack:
        named = stack.enter_context(open_gguf(path))
        count = named.get("split.count", 1)
        if type(count) is not int or not 0 <= count <= MAX_PARTS:
            raise InputError(f"{path}: split.count must be 0 to {MAX_PARTS}, got {count!r}; the file is damaged")
        if count <= 1:
            stack.pop_all()
            return named
        whole = _whole(named, count)
        parts: list[Reader] = []
        for i in range(count):
            part_at = part_path(whole, i, count)
            try:
                part = stack.enter_context(open_gguf(part_at))
            except InputError as e:
                raise InputError(f"part {i + 1} of {count} of a split model: {e}") from e
            parts.append(part)
            found = part.get("split.no"), part.get("split.count")
            if found != (i, count):
                raise InputError(
                    f"{part_at}: must be part {i} of {count} (counted from 0), but says it is part {found[0]} of "
                    f"{found[1]}; give the files their original names"
                )
        _check_tensors(parts)
        named.close()
        stack.pop_all()
        return ShardedReader(parts)


def _whole(named: Reader, count: int) -> Path:
    """The path of the model if it were one file."""
    match = _NAME.fullmatch(named.path.name)
    if match is None or int(match["count"]) != count:
        raise InputError(
            f"{named.path}: is part of a model in {count} files, which must be called NAME-00001-of-{count:05d}.gguf "
            "and so on; give the files their original names"
        )
    return named.path.with_name(match["prefix"] + ".gguf")


def _check_tensors(parts: list[Reader]) -> None:
    owners: dict[str, Path] = {}
    for part in parts:
        for name in part.tensors:
            if name in owners:
                raise InputError(
                    f"{part.path}: tensor {name} is in {owners[name].name} too; the parts belong to different models"
                )
            owners[name] = part.path
    announced = parts[0].get("split.tensors.count", len(owners))
    if announced != len(owners):
        raise InputError(
            f"{parts[0].path}: the parts must hold {announced} tensors, but hold {len(owners)}; they are damaged or "
            "belong to different models"
        )
