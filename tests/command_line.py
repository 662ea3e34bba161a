"""Runs commands of `agq-gguf`, in this process or in one of their own; for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
