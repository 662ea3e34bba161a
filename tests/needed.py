"""What some tests need and not every machine has: programs, and the sources of llama.cpp.

Without it a test is skipped. CI on Linux must have everything (`.ci/run` installs it): there the test fails, so that
CI is not green because a tool is missing.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skips the test that runs, or fails it in CI on Linux; `what` is a sentence."""
    if os.environ.get("CI") == "true" and sys.platform == "linux":
        pytest.fail(f"{what}; CI on Linux must run this test", pytrace=False)
    pytest.skip(what)


def check(item: pytest.Item) -> None:
    """Skips or fails a test whose mark ``needs`` names a program that is not on PATH."""
    programs = [str(name) for mark in item.iter_markers("needs") for name in mark.args]
    if absent := [name for name in programs if not shutil.which(name)]:
        missing(f"not installed: {', '.join(absent)}")


def ggml_sources() -> Path:
    """Folder of llama.cpp's sources, which AGQ_GGML_SOURCES names (docs/arm.md)."""
    named = os.environ.get("AGQ_GGML_SOURCES")
    if not named:
        missing("AGQ_GGML_SOURCES does not name the folder of llama.cpp's sources (docs/arm.md)")
    return Path(named)
