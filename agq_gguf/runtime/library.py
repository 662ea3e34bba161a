"""The installed llama-cpp-python: its bindings and its version."""

from __future__ import annotations

import ctypes
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
    """Version of the ggml in llama-cpp-python."""
    try:
        function = llama_api()._lib.ggml_version  # also searches the libraries that libllama depends on
    except AttributeError:
        return "unknown"
    function.restype = ctypes.c_char_p
    return str((function() or b"unknown").decode())
