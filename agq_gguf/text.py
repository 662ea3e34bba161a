"""Reads texts that users give."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agq_gguf.arguments import Text
from agq_gguf.errors import InputError


def read_text(source: Text) -> Iterator[str]:
    """Strings of text from a path or from an iterable. Raises InputError when the file cannot be read."""
    if not isinstance(source, (str, os.PathLike)):
        yield from source
        return
    try:
        yield Path(source).read_text("utf-8", "surrogateescape")
    except OSError as e:
        raise InputError(f"{source}: the calibration text cannot be read: {e.strerror}") from e
