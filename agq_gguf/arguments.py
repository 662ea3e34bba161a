"""Types of arguments that several stages take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

PathName = str | os.PathLike[str]
Text = PathName | Iterable[str]  # the path of a text file, or strings of text
Progress = Callable[[str, int, int, str], None]  # phase, done, total, what is being worked on
