"""Agile-Quant for GGUF: quantize models to AGQ4 and run them in the stock llama-cpp-python.

Importing this package is light: it loads neither torch nor llama_cpp. If ``gguf`` is installed it learns the type AGQ4,
so that ``gguf.GGUFReader`` and ``gguf.quants.dequantize`` read our files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agq_gguf._version import __version__
from agq_gguf.errors import AgqError, FormatError, HostError, InputError, OutputError
from agq_gguf.integrations import gguf_package
from agq_gguf.native import backend_path
from agq_gguf.runtime.plugin import last_pruned, options, register

if TYPE_CHECKING:
    from agq_gguf.inspection.verify import verify
    from agq_gguf.quantization.packing import pack_agq4
    from agq_gguf.quantization.pipeline import quantize

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
_LAZY = {
    "quantize": ".quantization.pipeline",
    "pack_agq4": ".quantization.packing",
    "verify": ".inspection.verify",
}

gguf_package.extend()


def __getattr__(name: str) -> Any:
    """Loads what is heavy only when it is asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
