"""Files that commands write: refused before the work, and never written over what a command reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from agq_gguf.errors import InputError, OutputError
from agq_gguf.gguf_io.writer import check_writable
from agq_gguf.inspection import plots

_MODEL = b"GGUF"  # how models begin


def check_output(path: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Raises InputError if `path` is one of the inputs or any model, OutputError if nothing can be written there."""
    try:
        _check(path, inputs)
    except (OSError, ValueError) as e:  # a name that is too long, or holds a zero byte
        raise OutputError(f"{path}: cannot write there: {getattr(e, 'strerror', None) or e}") from e


def _check(path: Path, inputs: Iterable[Path | None]) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if any(source is not None and _same(path, source) for source in inputs):
        raise InputError(f"{path}: is read by this command; write to another file")
    if path.is_file():
        try:
            with path.open("rb") as file:
                is_model = file.read(len(_MODEL)) == _MODEL
        except OSError:  # what cannot be read may still be written
            is_model = False
        if is_model:
            raise InputError(f"{path}: is a GGUF model; write to another file")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise OutputError(f"{path}: cannot be written: no permission, or a read-only file system")
    else:
        check_writable(path)


def check_picture(path: Path | None, inputs: Iterable[Path | None] = ()) -> None:
    """The same for a picture, if one is wanted; also raises what `plots.check_kind` raises."""
    if path is not None:
        plots.check_kind(path)
        check_output(path, inputs)


def write_text(path: Path, text: str, *, new: bool = False) -> None:
    """Writes a file; names in it that are not UTF-8 get question marks. With `new` an existing file is kept.

    Raises OutputError.
    """
    try:
        with path.open("xb" if new else "wb") as file:
            file.write(text.encode("utf-8", "replace"))
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror}") from e


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False
