"""A real llama-server with the plugin, for tests: AGQ_LLAMA_SERVER names one of llama.cpp."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import COMMAND, environment, heeding_interrupts

REAL = os.environ.get("AGQ_LLAMA_SERVER", "")
PEOPLE = 8


def started_by(process: int) -> list[int]:
    """The processes that a process started, and those that these started. Linux only: empty elsewhere."""
    threads = Path(f"/proc/{process}/task").glob("*/children")
    found = [int(number) for children in threads for number in children.read_text(encoding="ascii").split()]
    return found + [number for child in found for number in started_by(child)]


@contextmanager
def running_server(model: Path, *arguments: object) -> Iterator[tuple[str, int]]:
    """Starts `agq-gguf serve`; yields the server's address and the number of its process. Skips without a server.

    `model` may be a folder. At the end it checks that the server stops when told to, and leaves no process behind.
    """
    if not REAL:
        pytest.skip("AGQ_LLAMA_SERVER is not set: a llama-server of llama.cpp")
    command = [*COMMAND, "serve", model, "--server", REAL, "--port", 0, "-t", 2, *arguments]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(),
        preexec_fn=heeding_interrupts,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.match(r"serving at (http://127\.0\.0\.1:\d+)/v1 with ", line)
        assert found, line
        try:
            yield found[1], running.pid
        finally:
            processes = started_by(running.pid)
            running.send_signal(signal.SIGINT)
            assert running.wait(60) == 0
            assert not [number for number in processes if Path(f"/proc/{number}").exists()]


def ask(url: str, path: str, body: dict[str, Any]) -> str:
    """The answer to a request, as text."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(response.read().decode())
