"""The host: the library with llama.cpp and ggml that runs the models in this process."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from agq_gguf.errors import HostError
from agq_gguf.runtime.library import llama_api

_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_version": (_TEXT, []),
    "ggml_backend_dev_count": (ctypes.c_size_t, []),
    "ggml_backend_reg_by_name": (_POINTER, [_TEXT]),
    "ggml_backend_load": (_POINTER, [_TEXT]),
    "ggml_backend_unload": (None, [_POINTER]),
    "ggml_backend_load_all_from_path": (None, [_TEXT]),
    "ggml_log_get": (None, [_POINTER, _POINTER]),
    "ggml_log_set": (None, [_POINTER, _POINTER]),
}


@dataclass(frozen=True)
class Host:
    """A host, and the ggml functions that Python calls in it."""

    name: str  # for messages
    library: ctypes.CDLL  # our own object with declared functions: its declarations affect no other user of the library

    @property
    def has_plugin(self) -> bool:
        """Whether the host has loaded the AGQ backend."""
        return bool(self.library.ggml_backend_reg_by_name(b"AGQ"))

    @property
    def ggml_version(self) -> str:
        """Version of the host's ggml."""
        return str(self.library.ggml_version().decode())


def llama_cpp_python() -> Host:
    """The llama-cpp-python of this environment. Raises HostError if it cannot be imported or has no ggml."""
    bindings = llama_api()
    return _declare(f"llama-cpp-python {sys.modules['llama_cpp'].__version__}", bindings._lib)


def loaded_host() -> Host:
    """The binding that this process has imported, llama-cpp-python before xllamacpp; if none, llama-cpp-python.

    Raises HostError if it cannot be used.
    """
    if "llama_cpp" not in sys.modules and "xllamacpp" in sys.modules:
        package = sys.modules["xllamacpp"]
        extension = sys.modules.get("xllamacpp.xllamacpp", package).__file__
        name = f"xllamacpp {getattr(package, '__version__', '')}".rstrip()
        if extension is None:
            raise HostError(f"{name} has no library; install it again with pip")
        return _declare(name, ctypes.CDLL(extension))
    return llama_cpp_python()


def open_host(path: str | os.PathLike[str]) -> Host:
    """The host in a library file: libllama or libggml, loaded or not. Raises HostError for any other file."""
    try:
        library = ctypes.CDLL(os.fspath(path))
    except OSError as error:
        raise HostError(f"{os.fspath(path)} cannot be loaded: {error}") from error
    host = _declare(os.fspath(path), library)
    if not host.library.ggml_backend_dev_count():
        # Builds with loadable backends keep the CPU backend as a file in the same folder, and load it at start.
        host.library.ggml_backend_load_all_from_path(os.fsencode(Path(path).resolve().parent))
    return host


def _declare(name: str, library: ctypes.CDLL) -> Host:
    own = ctypes.CDLL(library._name, handle=library._handle)
    for function_name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(own, function_name)
        except AttributeError as error:
            raise HostError(
                f"{name} has no function {function_name}, which the plugin needs; "
                "register(library=...) takes the path of libllama or libggml"
            ) from error
        function.restype, function.argtypes = result, arguments
    return Host(name, own)
