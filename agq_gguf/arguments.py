"""Types of arguments that several stages share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

PathName = str | os.PathLike[str]
Text = PathName | Iterable[str]  # the path of a text file, or strings of text
Progress = Callable[[str, int, int, str], None]  # phase, units done, total units, current item


def no_progress(phase: str, done: int, total: int, what: str) -> None:
    """A `Progress` that shows nothing."""
