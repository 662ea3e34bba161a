"""Agile-Quant for GGUF: quantize models to AGQ4 and run them in the stock llama-cpp-python.

Importing this package is light: it loads neither torch nor llama_cpp. If ``gguf`` is installed it learns the type AGQ4,
so that ``gguf.GGUFReader`` and ``gguf.quants.dequantize`` read our files.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from . import gguf_type
from .errors import AgqError, FormatError, HostError, InputError, OutputError
from .plugin import backend_path, last_pruned, options, register

if TYPE_CHECKING:
    from .convert import quantize
    from .packing import pack_agq4
    from .verification import verify

try:
    __version__ = metadata.version("agq-gguf")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AgqError",
    "FormatError",
    "HostError",
    "InputError",
    "OutputError",
    "__version__",
    "backend_path",
    "last_pruned",
    "options",
    "pack_agq4",
    "quantize",
    "register",
    "verify",
]

# What loads torch or llama_cpp is imported from here when it is first used.
_LAZY = {"quantize": ".convert", "pack_agq4": ".packing", "verify": ".verification"}

gguf_type.extend()


def __getattr__(name: str) -> Any:
    """Loads what is heavy only when it is asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
