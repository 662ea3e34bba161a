"""Weights in huge pages: the same answers, memory that belongs to no file, and the reasons when they stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has transparent huge pages")

# Prints logits in hexadecimal digits and how many bytes of the process's memory are mapped from the model's file; in
# the second line the same of a second context in another thread. Options: "no-mmap", "locked", "large" (contexts with
# several MB of keys and values).
PROGRAM = """
import ctypes, logging, sys, threading
import agq_gguf
from agq_gguf.runtime.model import Batch, Model

cells = 32768 if "large" in sys.argv else 64

def mapped(path):
    lines = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(path)]
    return sum(int(end, 16) - int(begin, 16) for begin, end in (line[0].split("-") for line in lines))

def answer(model):
    with model.context(cells, threads=2) as context:
        batch = Batch(list(range(3, 30)))
        context.decode(batch)
        print(context.logits(batch).tobytes().hex(), mapped(sys.argv[1]), flush=True)

logging.basicConfig(level=logging.DEBUG)
agq_gguf.register()
if "locked" in sys.argv:
    page = ctypes.create_string_buffer(8192)
    print("locked", ctypes.CDLL(None).mlock(page, 8192), file=sys.stderr)
with Model(sys.argv[1], use_mmap="no-mmap" not in sys.argv) as model:
    answer(model)
    other = threading.Thread(target=answer, args=(model,))
    other.start()
    other.join()
print("unmapped", mapped(sys.argv[1]))
"""


def run(model: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), *options],
        capture_output=True, text=True, check=False, timeout=120, env=environment(**variables),
    )  # fmt: skip


def read(result: subprocess.CompletedProcess[str]) -> tuple[str, int]:
    """The logits, which both contexts must agree on, and the bytes that are mapped from the file afterwards."""
    assert result.returncode == 0, result.stderr
    first, second, end = (line.split() for line in result.stdout.splitlines())
    assert first[0] == second[0] and end == ["unmapped", "0"]
    return second[0], int(second[1])


@pytest.fixture(scope="module")
def in_file(llama_agq: Path) -> tuple[str, int]:
    """What the model answers, and how much of it is mapped, with its weights in the file."""
    found = read(run(llama_agq, AGQ_HUGE_PAGES="off"))
    assert found[1] > 0
    return found


def test_weights_leave_the_file_and_answers_stay(llama_agq: Path, in_file: tuple[str, int]) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system gives no huge pages")
    result = run(llama_agq, AGQ_HUGE_PAGES="on")
    logits, mapped = read(result)
    assert logits == in_file[0]
    assert mapped < in_file[1] / 4
    assert result.stderr.count("of weights from the mapped file into huge pages") == 1  # once for both contexts


def test_small_models_stay_in_the_file(llama_agq: Path, in_file: tuple[str, int]) -> None:
    assert read(run(llama_agq)) == in_file


def test_without_a_mapped_file(llama_agq: Path, in_file: tuple[str, int]) -> None:
    assert read(run(llama_agq, "no-mmap", AGQ_HUGE_PAGES="on")) == (in_file[0], 0)


def test_keys_and_values(llama_agq: Path, in_file: tuple[str, int]) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    result = run(llama_agq, "large")
    assert read(result) == in_file
    # Each of the two contexts renews its own.
    assert result.stderr.count("keys and values get huge pages") == (2 if "[madvise]" in setting else 0)
    result = run(llama_agq, "large", AGQ_HUGE_PAGES="off")
    assert read(result) == in_file
    assert "keys and values" not in result.stderr


def test_locked_memory_stays(llama_agq: Path, in_file: tuple[str, int]) -> None:
    result = run(llama_agq, "locked", AGQ_HUGE_PAGES="on")
    if "locked 0" not in result.stderr:
        pytest.skip("this process may not lock memory")
    assert read(result) == in_file
    assert "weights are not in huge pages: the process has locked its memory" in result.stderr


def test_files_in_memory_stay(llama_agq: Path, in_file: tuple[str, int]) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no file system in memory")
    model = Path(shutil.copy(llama_agq, memory / f"agq-huge-pages-{llama_agq.stat().st_ino}.gguf"))
    try:
        assert read(run(model, AGQ_HUGE_PAGES="on")) == in_file
    finally:
        model.unlink()


def test_a_wrong_value_is_refused(llama_agq: Path) -> None:
    result = run(llama_agq, AGQ_HUGE_PAGES="yes")
    assert result.returncode != 0 and "AGQ_HUGE_PAGES must be auto, on or off, got 'yes'" in result.stderr
    assert run(llama_agq, AGQ_HUGE_PAGES="").returncode == 0  # an empty variable is one that is not set
