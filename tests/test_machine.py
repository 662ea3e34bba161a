"""What the plugin and the system say of the processor, and how fast it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import environment

from agq_gguf.errors import HostError
from agq_gguf.runtime.machine import free_memory, kernels, measure_speed, processor


def test_processor(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    cpuinfo = tmp_path / "proc" / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: AMD EPYC 9654: 96 cores\nflags\t\t: fpu sse2 avx512_vnni avx2 fma\n\n"
        "processor\t: 1\nmodel name\t: other\nflags\t\t: amx_int8\n"
    )
    found = processor(tmp_path)
    assert (found.name, found.features) == ("AMD EPYC 9654: 96 cores", ["avx2", "fma", "avx512_vnni"])
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp\n")
    assert processor(tmp_path).features == ["asimd", "asimddp"]
    assert processor(tmp_path).name != ""
    assert processor(tmp_path / "nowhere").features == []


def measured(kernel: str) -> tuple[list[str], float]:
    """Names of the chosen kernels, and the speed of products, in a process with AGQ_FORCE_ISA."""
    code = (
        "import json\nfrom agq_gguf.runtime.machine import kernels, measure_speed\n"
        "print(json.dumps([[k.name for k in kernels() if k.chosen], measure_speed(1, 0.2).operations_per_second]))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(AGQ_FORCE_ISA=kernel)
    )
    chosen, speed = json.loads(shown.stdout)
    return chosen, speed


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGQ_FORCE_ISA", raising=False)
    found = kernels()
    assert found[-1].name == "scalar" and found[-1].supported
    assert [kernel.name for kernel in found if kernel.chosen] == [next(k.name for k in found if k.supported)]


def test_the_chosen_kernel_is_measured() -> None:
    scalar, slow = measured("scalar")
    best, fast = measured("")
    assert scalar == ["scalar"] and slow > 1e6
    assert best != ["scalar"] and fast > 5 * slow  # every machine that runs these tests has a vector kernel
    assert measured("perhaps") == ([], 0)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread of two gets none: the other does not wait for it."""
    ones, calls = np.ones, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError
        return ones(*arguments)

    monkeypatch.setattr("numpy.ones", fail_once)
    with pytest.raises(HostError, match="too little memory"):
        measure_speed(2, 0.1)


def test_speed() -> None:
    begun = time.monotonic()
    found = measure_speed(2, 0.4)
    assert 0.4 < time.monotonic() - begun < 30
    assert found.threads == 2
    assert 1e8 < found.read_bytes_per_second < 1e13
    assert 0 < found.cpu_share <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is free")
def test_free_memory() -> None:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    said = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    assert said and 0 < (free_memory() or 0) < 1024 * int(said[1]) + (1 << 30)


def _control_group() -> tuple[Path, str]:
    """The folder of this process's control group for memory, and the name of its limit."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path[1:], "memory.limit_in_bytes"
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup") / path[1:], "memory.max"
    pytest.skip("this system has no control groups for memory")


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are a part of Linux")
def test_free_memory_in_a_container() -> None:
    own, limit = _control_group()
    group = own / f"agq-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a control group: {error}")
    try:
        (group / limit).write_text(str(1 << 29), encoding="ascii")
        code = f"""
import os, pathlib
pathlib.Path({str(group / "cgroup.procs")!r}).write_text(str(os.getpid()), encoding="ascii")
from agq_gguf.runtime.machine import free_memory
print(free_memory())
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert 1 << 27 < int(done.stdout) < 1 << 29
    except OSError as error:
        pytest.skip(f"cannot limit a control group: {error}")
    finally:
        group.rmdir()
