"""`--memory` is a bound: what quantizing needs in a process of its own, for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from command_line import environment

from agq_gguf.calibration.memory import hessian_bytes, work_bytes

MiB = 1 << 20

# Prints the peak of resident memory in KiB, and the report's warnings. getrusage would also count the process that
# started this one.
PROGRAM = """
import json, re, sys
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
source, target, quality, memory, text = sys.argv[1:]
options = QuantizeOptions(quality=quality, memory=int(memory), threads=2, tune=False, calibration_tokens=4096)
report = quantize(source, target, calibration=[text], options=options)
[peak] = re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(json.dumps([int(peak), report.warnings]))
"""


def quantized(source: Path, words: str, memory: int, quality: str = "balanced") -> tuple[int, list[str]]:
    """Peak bytes, and warnings."""
    target = source.with_name("o.gguf")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(target), quality, str(memory), words],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kib, warnings = json.loads(result.stdout)
    return kib * 1024, warnings


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("columns", "memory", "whole"),
    [
        (3072, 64 * MiB, False),
        (3072, 128 * MiB, True),
        pytest.param(12288, 1400 * MiB, True, marks=pytest.mark.slow),
        pytest.param(28672, 1024 * MiB, False, marks=pytest.mark.slow),
    ],
)
def test_the_bound_holds(tmp_path: Path, words: str, columns: int, memory: int, whole: bool) -> None:
    assert whole == (hessian_bytes(columns) + work_bytes(columns) <= memory)
    source = tiny_models.write_llama(tmp_path / "m.gguf", n_ff=columns, n_layer=1)  # a feed-forward of so many columns
    peak, warnings = quantized(source, words, memory)
    assert peak < 1.1 * memory + 400 * MiB
    told = [w for w in warnings if f"the Hessian of {columns} columns does not fit" in w]
    assert len(told) == (not whole)
    if whole:
        assert peak > 2 * hessian_bytes(columns)  # the matrices really were there


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_logits_of_a_large_vocabulary_are_within_the_bound(tmp_path: Path, words: str) -> None:
    """2048 tokens have 800 MB of logits, and gradients need several copies."""
    words = words * 8
    source = tiny_models.write_llama(tmp_path / "m.gguf", n_layer=1, vocab=100_000)
    peak, warnings = quantized(source, words, 1024 * MiB, "best")
    assert not any("falling back" in w for w in warnings), warnings
    assert peak < 1.1 * 1024 * MiB + 400 * MiB


def test_the_report_names_the_memory_that_is_enough() -> None:
    needed = -(-(hessian_bytes(28672) + work_bytes(28672)) >> 20)
    assert needed == 6496
