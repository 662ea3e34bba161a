"""The plugin library: its path, and its C functions that Python calls (declared in cpp/abi)."""

from __future__ import annotations

import _ctypes
import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

from agq_gguf.errors import HostError

_FILE_NAME = "libggml-agq" + (".dll" if sys.platform == "win32" else ".so")

_POINTER, _TEXT, _INT, _COUNT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64

# Result and arguments of each function. Functions for rounding, for kernels and their speed, and for free memory need
# no host library; all others need the plugin to be registered.
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "agq_last_error": (_TEXT, []),
    # index, name, what was found, whether it passed, microseconds
    "agq_abi_proof": (
        _INT,
        [_INT, ctypes.POINTER(_TEXT), ctypes.POINTER(_TEXT), ctypes.POINTER(_INT), ctypes.POINTER(ctypes.c_double)],
    ),
    # index, name, whether supported, whether chosen
    "agq_kernel": (_INT, [_INT, ctypes.POINTER(_TEXT), ctypes.POINTER(_INT), ctypes.POINTER(_INT)]),
    # words, n, seconds
    "agq_read_speed": (ctypes.c_double, [_POINTER, _COUNT, ctypes.c_double]),
    "agq_product_speed": (ctypes.c_double, [ctypes.c_double]),
    "agq_free_memory": (_COUNT, []),
    "agq_set_option": (_TEXT, [_INT, _TEXT]),
    "agq_last_pruned": (_INT, [ctypes.POINTER(_INT), _INT]),
    "agq_last_bits": (_INT, [ctypes.POINTER(_INT), _INT]),
    "agq_last_head_weights": (_INT, [_INT, _INT, ctypes.POINTER(ctypes.c_float), _INT]),
    "agq_last_importance": (_INT, [_INT, ctypes.POINTER(ctypes.c_float), _INT]),
    "agq_profile": (None, [_INT]),
    "agq_profile_report": (_INT, [_TEXT, _INT]),
    # values, weights, h, each, n, scales
    "agq_search_scales": (None, [_POINTER, _POINTER, _POINTER, _INT, _COUNT, _POINTER]),
    # values, upper, weights, n, codes, scales, errors
    "agq_feed_back": (None, [_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _POINTER, _POINTER]),
    # values, inside, slope, n, codes, scales, errors
    "agq_descend": (None, [_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _POINTER, _POINTER]),
    # left, stride, right, k, n, out
    "agq_subtract_product": (None, [_POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER]),
    # columns, n, steps, offsets, most, upper, weights, codes, errors
    "agq_feed_back_on_grid": (None, [_COUNT, _COUNT, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER]),
    # columns, n, steps, offsets, most, inside, slope, codes, change
    "agq_descend_on_grid": (None, [_COUNT, _COUNT, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER]),
}


@cache
def backend_path() -> Path:
    """Path of the plugin library, for ``GGML_BACKEND_PATH``.

    Raises HostError if there is none: then the package was not built.
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


class _Open:
    """Opens the library for each use: a handle, and its functions with declared types.

    Python must not keep the library open. When a host unloads the plugin, the plugin clears its slot of the type table,
    but only once the last handle is closed. One handle stays open until a host has loaded the library, because loading
    it again takes as long as rounding a few columns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: int | None = None
        self._is_left_to_host = False
        self._library: ctypes.CDLL | None = None
        self._address = 0  # of a function of `_library`; tells whether the same library is still loaded

    def open(self) -> tuple[ctypes.CDLL, int]:
        path = str(backend_path())
        with self._lock:
            try:
                handle = _ctypes.dlopen(path, ctypes.DEFAULT_MODE)
            except OSError as error:
                raise HostError(f"the plugin {path} cannot be loaded: {error}") from error
            if self._kept is None and not self._is_left_to_host:
                self._kept = _ctypes.dlopen(path, ctypes.DEFAULT_MODE)
            address = _ctypes.dlsym(handle, "agq_last_error")
            if self._library is None or address != self._address:
                self._library, self._address = _declare(path, handle), address
            return self._library, handle

    def close(self, handle: int) -> None:
        _ctypes.dlclose(handle)

    def leave_to_host(self) -> None:
        with self._lock:
            if self._kept is not None:
                self.close(self._kept)
            self._kept, self._is_left_to_host = None, True


_open = _Open()


@contextmanager
def plugin_library() -> Iterator[ctypes.CDLL]:
    """The plugin library with its functions declared, open inside the ``with`` block.

    Raises HostError if it is missing or cannot be loaded.
    """
    if sys.platform == "win32":
        yield _loaded_for_good(str(backend_path()))
        return
    library, handle = _open.open()
    try:
        yield library
    finally:
        _open.close(handle)


def leave_to_host() -> None:
    """Call this once a host has loaded the library: from then on the host decides how long it stays loaded."""
    _open.leave_to_host()


def _declare(path: str, handle: int | None = None) -> ctypes.CDLL:
    library = ctypes.CDLL(path, handle=handle)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _loaded_for_good(path: str) -> ctypes.CDLL:
    try:
        return _declare(path)
    except OSError as error:
        raise HostError(f"the plugin {path} cannot be loaded: {error}") from error
