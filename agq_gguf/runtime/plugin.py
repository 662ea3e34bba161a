"""Where the built plugin is, and how to load it into the llama.cpp of the installed llama-cpp-python."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agq_gguf import native
from agq_gguf.errors import HostError, InputError

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_lock = threading.Lock()


class _DlInfo(ctypes.Structure):
    """What dladdr(3) fills in."""

    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol", ctypes.c_void_p),
    )


def _make_visible(function: Any) -> None:
    """Load the library that holds ``function`` once more, so that its symbols become global.

    llama_cpp loads its libraries privately. A wheel holds each of them under several names, as copies and not as links,
    so the one in use is found by the address of a function of it, never by its name.
    """
    if sys.platform == "win32":
        return  # the plugin asks for the modules by name there
    info = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(_DlInfo)]
    if dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)) and info.file_name:
        ctypes.CDLL(os.fsdecode(info.file_name), mode=os.RTLD_GLOBAL | os.RTLD_NOLOAD)


def _host() -> ctypes.CDLL:
    """libllama of llama-cpp-python; through it, all functions of ggml can be reached."""
    try:
        import llama_cpp
    except ImportError as error:
        raise HostError(f"llama-cpp-python cannot be imported ({error}); install it with pip") from error
    library = llama_cpp.llama_cpp._lib
    try:
        for function in (library.ggml_version, library.ggml_backend_load):
            _make_visible(function)
        library.ggml_backend_reg_by_name.restype = ctypes.c_void_p
        library.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
        library.ggml_backend_load.restype = ctypes.c_void_p
        library.ggml_backend_load.argtypes = [ctypes.c_char_p]
    except (AttributeError, OSError) as error:
        raise HostError(
            f"llama-cpp-python {llama_cpp.__version__} does not offer the ggml functions that the plugin needs "
            f"({error}); supported are releases 0.3.30 to 0.3.36"
        ) from error
    return library


def is_registered() -> bool:
    """Whether this process's ggml has the AGQ backend already."""
    return bool(_host().ggml_backend_reg_by_name(b"AGQ"))


def register() -> None:
    """Load the plugin into this process's llama-cpp-python; models of type AGQ4 can then be loaded.

    May be called any number of times and from any thread. Raises HostError if the plugin is not built, or if this
    llama-cpp-python is not one it supports; the message names what was found.
    """
    with _lock:
        if is_registered():
            return
        path, library = native.backend_path(), _host()
        plugin = native.plugin_library()  # held open: ggml unloads a plugin that refuses, and with it the reason
        with _silenced(library):
            loaded = library.ggml_backend_load(os.fsencode(path))
        if not loaded:
            raise HostError(f"the plugin {path} did not load: {plugin.agq_last_error().decode()}")


def registered_library() -> ctypes.CDLL:
    """The plugin library, registered. Raises HostError as `register` does."""
    register()
    return native.plugin_library()


class _ThreadOptions(threading.local):
    prune: str | None = None


_thread_options = _ThreadOptions()


@contextmanager
def options(*, prune: str | None) -> Iterator[None]:
    """Options for the contexts (``llama_cpp.Llama`` objects) that this thread creates inside the ``with`` block.

    ``prune`` is what the environment variable AGQ_PRUNE would hold (docs/pruning.md, "Control"): ``"off"``, ``"file"``,
    ``"3:0.5"`` (behind layer 3 drop half of the prompt's tokens), ...; None: what AGQ_PRUNE does hold. Contexts keep
    their options when the block ends. Raises InputError if the text is not understood, HostError as ``register``.
    """
    library = registered_library()
    before = _thread_options.prune
    _set_prune(library, prune)
    try:
        yield
    finally:
        _set_prune(library, before)


def _set_prune(library: ctypes.CDLL, prune: str | None) -> None:
    error = library.agq_set_prune(None if prune is None else prune.encode())
    if error:
        raise InputError(error.decode())
    _thread_options.prune = prune


def last_pruned() -> list[int]:
    """What became of the tokens of the sequence that this thread has computed last.

    For each position the layer behind which its token was dropped, or -1 if it was kept.
    """
    library = registered_library()
    n = library.agq_last_pruned(None, 0)
    layers = (ctypes.c_int32 * n)()
    library.agq_last_pruned(layers, n)
    return list(layers)


@contextmanager
def _silenced(library: ctypes.CDLL) -> Iterator[None]:
    """Keep ggml's line about a loaded backend, which it logs as it would a model, off the screen."""
    callback, user_data = ctypes.c_void_p(), ctypes.c_void_p()
    library.ggml_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    ignore = _LOG_CALLBACK(lambda level, text, data: None)
    library.ggml_log_set(ignore, None)
    try:
        yield
    finally:
        library.ggml_log_set(callback, user_data)
