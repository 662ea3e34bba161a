"""A comparison as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agq_gguf.comparison.result import Comparison
from agq_gguf.measure.row import Row

_HEAD = ("type", "MB", "bits per weight", "KL divergence x 1000", "perplexity", "same top token")


def table(found: Comparison) -> str:
    """The rows as a table in Markdown, and a line that says what was measured."""
    has_speed = any(row.prompt_speed for row in found.rows)
    head = [*_HEAD, *([f"prompt {found.prompt}, t/s", f"generation {found.generation}, t/s"] if has_speed else [])]
    lines = [_line(head), _line(["---"] * len(head)), *(_line(_cells(row, has_speed)) for row in found.rows)]
    return "\n".join([*lines, "", setup(found)]) + "\n"


def setup(found: Comparison) -> str:
    """What was measured, in two sentences."""
    return (
        f"KL divergence from {Path(found.source).name} on {found.text} ({found.positions} positions); calibration text "
        f"and importance matrix: {found.calibration}. {found.processor}, {found.threads} threads."
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, has_speed: bool) -> list[str]:
    name = f"**{row.name}**" if row.ours else row.name
    divergence = "0" if row.name == "source" else f"{1000 * row.mean_kl:.2f} ± {1000 * row.mean_kl_error:.2f}"
    megabytes = row.file_bytes / 1e6
    cells = [
        name, f"{megabytes:.{0 if megabytes >= 10 else 1}f}", f"{row.bits_per_weight:.2f}", divergence,
        f"{row.perplexity:.3f}",
        f"{row.top1_agreement:.1%}",
    ]  # fmt: skip
    if has_speed:
        cells += ["-" if speed is None else f"{speed:.0f}" for speed in (row.prompt_speed, row.generation_speed)]
    return cells
