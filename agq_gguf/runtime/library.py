"""The installed llama-cpp-python: its bindings, its version, and the default number of threads."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from agq_gguf.errors import HostError


def llama_api() -> Any:
    """The ctypes bindings `llama_cpp.llama_cpp`. Raises HostError if llama-cpp-python cannot be imported."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as e:
        raise HostError(f"llama-cpp-python cannot be imported ({e}); install it with pip") from e
    return llama_cpp.llama_cpp


def ggml_version() -> str:
    """Version of the ggml inside llama-cpp-python."""
    try:
        function = llama_api()._lib.ggml_version  # looked up in the libraries that libllama depends on
    except AttributeError:
        return "unknown"
    function.restype = ctypes.c_char_p
    return str((function() or b"unknown").decode())


def default_threads() -> int:
    """Number of CPUs that this process may use, from its affinity and the CPU quota of its container.

    More threads would wait for each other in ggml's spinning barriers.
    """
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(n, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups, or no quota ("max")
        return n
