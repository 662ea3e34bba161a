"""A test whose tool is missing is skipped on a developer's machine and fails in CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="CI must have every tool on Linux only")
@pytest.mark.parametrize(("ci", "outcome"), [("true", "2 errors"), ("", "2 skipped")])
def test_missing_tools(ci: str, outcome: str, tmp_path: Path) -> None:
    """A program that is not there, and sources of llama.cpp that are not there."""
    (tmp_path / "g++").touch(mode=0o755)
    tests = ("test_fuzz.py::test_libfuzzer", "test_rpc.py::test_two_servers_give_the_logits_of_one_process")
    paths = [str(HERE / name) for name in tests]
    command = [sys.executable, "-m", "pytest", "--slow", "-p", "no:cacheprovider", *paths]
    variables = environment(CI=ci, PATH=str(tmp_path), AGQ_GGML_SOURCES="", PYTEST_ADDOPTS="")
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=HERE.parent)
    assert outcome in result.stdout.splitlines()[-1], result.stdout + result.stderr
    for reason in ("not installed: clang++", "AGQ_GGML_SOURCES does not name"):
        assert reason in result.stdout
