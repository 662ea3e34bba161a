"""A test whose tool is missing is skipped on a developer's machine and fails in CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="CI must have every tool on Linux only")
@pytest.mark.parametrize(("ci", "outcome"), [("true", "1 error"), ("", "1 skipped")])
@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("test_fuzz.py::test_libfuzzer", "not installed: clang++"),
        ("test_rpc.py::test_two_servers_give_the_logits_of_one_process", "AGQ_GGML_SOURCES does not name"),
    ],
)
def test_missing_tools(test: str, reason: str, ci: str, outcome: str, tmp_path: Path) -> None:
    for name in ("g++", "clang++") if "rpc" in test else ():
        (tmp_path / name).touch(mode=0o755)
    command = [sys.executable, "-m", "pytest", "--slow", "-p", "no:cacheprovider", str(HERE / test)]
    variables = environment(CI=ci, PATH=str(tmp_path), AGQ_GGML_SOURCES="", PYTEST_ADDOPTS="")
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=HERE.parent)
    assert outcome in result.stdout.splitlines()[-1], result.stdout + result.stderr
    assert reason in result.stdout
