"""What the command line prints: tables, progress, sizes."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from agq_gguf.gguf_io.tensor_names import split_name

_PLAIN_WIDTH = 200  # columns of a table in a file or a pipe
_LINES = 10  # lines of plain progress for each phase


def safe(text: object) -> str:
    """Text that is safe to print. Names in a file may hold escape sequences, or characters the terminal lacks."""
    clean = "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in str(text))
    encoding = sys.stdout.encoding or "utf-8"
    return clean.encode(encoding, "replace").decode(encoding)


class _Console(Console):
    """A console that raises when the output pipe is closed, as plain writes do."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError; rich would end the process silently."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console on the current stdout or stderr that prints text unchanged."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=None if terminal else _PLAIN_WIDTH)


def say(text: str = "") -> None:
    """Prints a line to stdout."""
    console().print(safe(text), soft_wrap=True)


def complain(text: str) -> None:
    """Prints a line to stderr. No work ends because a log has no room for it."""
    try:
        console(stderr=True).print(safe(text), soft_wrap=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def write_json(value: Any) -> None:
    """Prints a value as JSON to stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=os.fspath) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table to stdout; columns whose name begins with ``>`` are aligned right, as for numbers."""
    out = console()
    style = box.SIMPLE_HEAD if out.is_terminal else None
    shown = Table(box=style, pad_edge=False, header_style="bold")
    for name in columns:
        shown.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        shown.add_row(*[safe(cell) for cell in row])
    out.print(shown)


def size(n_bytes: float) -> str:
    """A number of bytes as text, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as text, in hours, minutes and seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


_UNITS = {"calibrate": "tokens", "quantize": "weights", "verify": "B"}  # what a phase counts; others show no speed


def resident() -> int:
    """Bytes of memory that this process occupies; 0 if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def _rate(phase: str, done: int, seconds: float) -> str:
    """Speed of a phase in its own unit; '' if it has none or nothing is done yet."""
    unit = _UNITS.get(phase)
    if unit is None or done <= 0 or seconds <= 0:
        return ""
    if unit == "B":
        return f"{size(done / seconds)}/s"
    per_second = done / seconds
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= 10 * factor:
            return f"{per_second / factor:.0f}{prefix} {unit}/s"
    return f"{per_second:.0f} {unit}/s"


def _place(what: str) -> str:
    """A tensor name in words: ``layer 3, attn_q.weight``."""
    layer, rest = split_name(what)
    return what if layer is None else f"layer {layer}, {rest}"


class _TimeLeft(ProgressColumn):
    """The time left, counted down between updates; the time that a phase took once it is done."""

    def render(self, task: Task) -> Text:
        """Text for a bar."""
        if task.finished:
            return Text(duration(task.finished_time or 0))
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{duration(max(0.0, ends - time.monotonic()))} left")


def _seconds_left(elapsed: float, first: int, done: int, total: int) -> float | None:
    """Time left, if the rest goes as fast as what was done since the phase began at `first`; None: not known yet."""
    return elapsed * (total - done) / (done - first) if first < done < total else None


class ProgressView:
    """Shows `(phase, done, total, what)` with speed, time left and memory: bars on a terminal, a few plain lines
    elsewhere, on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        """With `quiet` nothing is shown."""
        self._console = console(stderr=True)
        self._quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}  # time and units done when a phase began
        self._lines: dict[str, int] = {}  # number of the last line shown for each phase

    def __enter__(self) -> ProgressView:
        """Starts the display."""
        if not self._quiet and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]}"),
                _TimeLeft(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[memory]}"),
                TextColumn("{task.fields[what]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        """Restores the terminal."""
        if self._bars is not None:
            self._bars.stop()

    def update(self, phase: str, done: int, total: int, what: str) -> None:
        """Shows that `done` of `total` units of a phase are done."""
        if self._quiet:
            return
        begun, first = self._begun.setdefault(phase, (time.monotonic(), done))
        elapsed = time.monotonic() - begun
        rate, place = _rate(phase, done - first, elapsed), safe(_place(what))
        left = _seconds_left(elapsed, first, done, total)
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, what="", rate="", memory="", ends=None)
            ends = None if left is None else time.monotonic() + left
            self._bars.update(
                self._tasks[phase],
                completed=done,
                total=total,
                what=place,
                rate=rate,
                memory=size(resident()),
                ends=ends,
            )
        else:
            self._line(phase, done, max(total, 1), elapsed, left, rate, place)

    def _line(
        self, phase: str, done: int, total: int, elapsed: float, left: float | None, rate: str, what: str
    ) -> None:
        share, line = done / total, done * _LINES // total
        if line <= self._lines.get(phase, -1):
            return
        self._lines[phase] = line
        took = f" in {duration(elapsed)}" if share >= 1 else ""
        until = "" if left is None else f"{duration(left)} left"
        memory = size(resident()) if resident() else ""
        details = "".join(f", {part}" for part in (rate, until, memory) if part)
        complain(f"{phase}: {share:.0%}{took}{details}{f' ({what})' if what else ''}")
