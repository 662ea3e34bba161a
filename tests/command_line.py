"""Runs commands of `agq-gguf`, in this process or in one of their own; for tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner, Result

import agq_gguf
from agq_gguf.cli import app as cli

COMMAND = [sys.executable, "-m", "agq_gguf"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # what plain text must not hold
runner = CliRunner()


def run(*arguments: object, code: int = 0, **options: Any) -> Result:
    """Runs a command in this process; its exit code must be `code`, an error must be one line."""
    result = runner.invoke(cli.app, [str(a) for a in arguments], **options)
    assert result.exit_code == code, f"{result.exception!r}\n{result.output}"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    # 2 without such a line is typer's own refusal of an option, with its usage.
    assert len(errors) == (code != 0) or (code == 2 and "Usage" in result.stderr)
    assert "Traceback" not in result.output
    return result


def environment(**variables: str) -> dict[str, str]:
    """The variables of a process that finds this package."""
    root = str(Path(agq_gguf.__file__).parent.parent)
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": search, **variables}


def heeding_interrupts() -> None:
    """For a child process: shells have background jobs ignore SIGINT, and their children after them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env=environment(), **options,
    )  # fmt: skip


# Runs commands in one process and prints, for each, its name, exit code, both streams and the exception.
_PROGRAM = """
import json, sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))
from typer.testing import CliRunner
from agq_gguf.cli.app import app
runner = CliRunner()
for words in json.loads(sys.argv[1]):
    result = runner.invoke(app, words, input="the red key\\n")
    told = None if isinstance(result.exception, SystemExit) else result.exception
    shown = result.exit_code, result.stdout, result.stderr, repr(told) if told else ""
    print(json.dumps([words[0], *shown]), flush=True)
"""


class Shown(NamedTuple):
    """What a command of `run_all` did."""

    code: int
    stdout: str
    stderr: str
    exception: str  # empty but for a bug


def run_all(commands: list[list[object]], *, without: Iterable[str] = ()) -> dict[str, Shown]:
    """Runs commands in one process of their own, whose end by one of them fails the test; what each did, by its name.

    For what llama.cpp might abort: one process loads everything once. Modules named in `without` cannot be imported.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, words, *without], capture_output=True, text=True, check=False, timeout=600,
        env=environment(),
    )  # fmt: skip
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    ended = commands[len(found)][0] if len(found) < len(commands) else ""
    assert result.returncode == 0 and not ended, (
        f"{ended} ended the process: {result.returncode}, {result.stderr[-900:]}"
    )
    return {name: Shown(*shown) for name, *shown in found}
