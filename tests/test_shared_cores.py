"""Waiting threads sleep while other processes use the cores; answers do not change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

# Prints the number of the process's threads with a context of two threads, and the logits of a few tokens.
PROGRAM = """
import os, sys, time
import agq_gguf
from agq_gguf.runtime.model import Batch, Model

agq_gguf.register()
with Model(sys.argv[1]) as model, model.context(64, threads=2) as context:
    batch = Batch(list(range(3, 30)))
    context.decode(batch)
    print(len(os.listdir("/proc/self/task")))
    print(context.logits(batch).tobytes().hex())
counts = []
for _ in range(50):  # threads that were told to end take a moment where others want the cores
    counts.append(len(os.listdir("/proc/self/task")))
    time.sleep(0.02)
print(min(counts))
"""

# Ends without freeing its context.
LEAVING_PROGRAM = """
import sys
import agq_gguf
from agq_gguf.runtime.model import Batch, Model

agq_gguf.register()
context = Model(sys.argv[1]).context(64, threads=2)
context.decode(Batch(list(range(3, 30))))
"""


def run(model: Path, wait: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(model)],
        capture_output=True, text=True, check=False, timeout=120, env=environment(AGQ_WAIT=wait),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is the host's on Linux")
def test_waiting_threads_sleep_and_answers_stay(llama_agq: Path) -> None:
    found = {wait: run(llama_agq, wait) for wait in ("spin", "sleep", "auto")}
    assert all(result.returncode == 0 for result in found.values()), found
    lines = {wait: result.stdout.splitlines() for wait, result in found.items()}
    assert lines["spin"][1] == lines["sleep"][1] == lines["auto"][1]
    # The team that makes OpenMP spin briefly: one thread that holds it, and one for each CPU.
    assert int(lines["sleep"][0]) >= int(lines["spin"][0]) + 2
    assert int(lines["sleep"][2]) <= int(lines["spin"][2])  # it is gone with the context


@pytest.mark.parametrize("wait", ["spin", "sleep"])
def test_a_process_may_end_with_its_context_open(llama_agq: Path, wait: str) -> None:
    result = run(llama_agq, wait, LEAVING_PROGRAM)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_wrong_value_is_refused(llama_agq: Path) -> None:
    result = run(llama_agq, "nap")
    assert result.returncode != 0 and "AGQ_WAIT must be auto, spin or sleep, got 'nap'" in result.stderr
    assert run(llama_agq, "").returncode == 0  # an empty variable is one that is not set
