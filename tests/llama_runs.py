"""Runs models in llama-cpp-python, in this process or another; for tests. It loads neither the plugin nor torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

TEXT = b"the red key in the box and the dog"  # short: see docs/design.md, "What int8 rounding does to comparisons"
LONG_TEXT = b" ".join([TEXT, b"went to the king who said the door of the house"] * 6)
HERE = Path(__file__).parent


def open_llama(path: Path, **options: Any) -> Any:
    """A model whose K/V cache is F32 unless said otherwise, so that nothing but the plugin rounds."""
    from llama_cpp import Llama

    return Llama(str(path), **{"n_ctx": 256, "n_threads": 2, "type_k": 0, "type_v": 0, "verbose": False, **options})


def all_logits(path: Path, text: bytes = TEXT, **options: Any) -> tuple[list[int], np.ndarray]:
    llama = open_llama(path, logits_all=True, **options)
    tokens = llama.tokenize(text)
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens)])
    llama.close()
    return tokens, logits


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def run_python(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, without the plugin registered."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE), **(env or {})},
        check=False,
    )
