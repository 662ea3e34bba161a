"""The plugin library: where it is, and the C functions of it that Python calls (cpp/abi declares them)."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from agq_gguf.errors import HostError

_FILE_NAME = "libggml-agq" + (".dll" if sys.platform == "win32" else ".so")

_POINTER, _TEXT, _INT, _COUNT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64

# Result and arguments of each function. Those for rounding need no host library; all others need the plugin registered.
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "agq_last_error": (_TEXT, []),
    "agq_set_prune": (_TEXT, [_TEXT]),
    "agq_last_pruned": (_INT, [ctypes.POINTER(_INT), _INT]),
    "agq_last_bits": (_INT, [ctypes.POINTER(_INT), _INT]),
    "agq_last_importance": (_INT, [_INT, ctypes.POINTER(ctypes.c_float), _INT]),
    "agq_profile": (None, [_INT]),
    "agq_profile_report": (_INT, [_TEXT, _INT]),
    # values, weights, h, each, n, scales
    "agq_search_scales": (None, [_POINTER, _POINTER, _POINTER, _INT, _COUNT, _POINTER]),
    # values, upper, weights, n, codes, scales, errors
    "agq_feed_back": (None, [_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _POINTER, _POINTER]),
    # values, inside, slope, n, codes, scales, errors
    "agq_descend": (None, [_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _POINTER, _POINTER]),
}


def backend_path() -> Path:
    """Path of the plugin library, for ``GGML_BACKEND_PATH``.

    Raises HostError if it is not there, which means that the package was not built.
    """
    candidates = [Path(__file__).parent / _FILE_NAME]
    try:
        # An editable install keeps the sources in place and the built library in site-packages.
        files = metadata.distribution("agq-gguf").files or []
        candidates += [Path(str(f.locate())) for f in files if f.name == _FILE_NAME]
    except metadata.PackageNotFoundError:
        pass
    for path in candidates:
        if path.is_file():
            return path.resolve()
    raise HostError(f"the plugin library {_FILE_NAME} is not built; install the package with pip install .")


@cache
def plugin_library() -> ctypes.CDLL:
    """The plugin library with its functions declared. Raises HostError if it is missing or cannot be loaded."""
    path = backend_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise HostError(f"the plugin {path} cannot be loaded: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
