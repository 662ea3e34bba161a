"""What a comparison has measured, and how it is read again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from agq_gguf.arguments import PathName
from agq_gguf.errors import InputError
from agq_gguf.measure.row import Row


@dataclass(frozen=True)
class Comparison:
    """The rows of all files, and what they were measured with."""

    source: str
    calibration: str
    text: str
    positions: int  # scored
    processor: str
    threads: int
    prompt: int
    generation: int
    rows: list[Row] = field(default_factory=list)


def read_comparison(path: PathName) -> Comparison:
    """Reads what `agq-gguf compare --json` printed. Raises InputError if the file is something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        return Comparison(**{**value, "rows": [Row(**row) for row in value["rows"]]})
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path}: expected the output of `agq-gguf compare --json`") from e
