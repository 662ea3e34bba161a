"""Loads the plugin into the host of this process, sets its options, and reports which tokens it dropped."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from agq_gguf import native
from agq_gguf.errors import HostError, InputError
from agq_gguf.runtime.host import Host, llama_cpp_python, loaded_host, open_host

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_WARN = 3  # enum ggml_log_level

_lock = threading.Lock()
_served: Host | None = None  # the host into which the plugin was loaded last


def is_registered() -> bool:
    """Whether the host of this process has the AGQ backend already."""
    return (_served or loaded_host()).has_plugin


def register(library: str | os.PathLike[str] | None = None) -> None:
    """Load the plugin into this process's llama.cpp, so that it can load models of type AGQ4.

    ``library`` is the path of the libllama or libggml that runs the models. The default is the library of the binding
    that this process has imported: llama-cpp-python, or xllamacpp if that is the only one.

    May be called any number of times and from any thread. Raises HostError if the plugin is not built, or if it does
    not support this host; the message says what was found.
    """
    _load_into(loaded_host() if library is None else open_host(library))


def register_for_models() -> None:
    """`register` for the host that runs models in this package, which is llama-cpp-python."""
    _load_into(llama_cpp_python())


def _load_into(host: Host) -> None:
    global _served
    with _lock:
        if not host.has_plugin:
            path = native.backend_path()
            with native.plugin_library() as plugin:  # if the plugin refuses, ggml unloads it; keep its error message
                with silenced(host):
                    loaded = host.library.ggml_backend_load(os.fsencode(path))
                if not loaded:
                    raise HostError(f"the plugin {path} did not load: {plugin.agq_last_error().decode()}")
            native.leave_to_host()
        _served = host


@contextmanager
def registered_library() -> Iterator[ctypes.CDLL]:
    """The plugin library, registered and open inside the ``with`` block. Raises HostError as `register` does."""
    if _served is None or not _served.has_plugin:
        register()
    with native.plugin_library() as library:
        yield library


# The position is the number that agq_set_option takes.
_OPTIONS = ("prune", "act_bits", "attention", "isa")


class _ThreadOptions(threading.local):
    def __init__(self) -> None:
        self.values: dict[str, str | None] = dict.fromkeys(_OPTIONS)


_thread_options = _ThreadOptions()


@contextmanager
def options(
    *,
    prune: str | None = None,
    act_bits: int | str | None = None,
    attention: str | None = None,
    isa: str | None = None,
) -> Iterator[None]:
    """Options for the contexts (``llama_cpp.Llama`` objects) that this thread creates inside the ``with`` block.

    Each overrides an environment variable (docs/environment.md lists all values). None keeps the value of an outer
    block, or else of the variable.

    - ``prune``, AGQ_PRUNE: ``"off"``, ``"file"``, ``"3:0.5"`` (after layer 3 drop half of the prompt's tokens), ...
    - ``act_bits``, AGQ_ACT_BITS: 8, 4, or ``"mixed:0.5"`` (4 bits for the less important half of a prompt's tokens).
    - ``attention``, AGQ_ATTENTION: ``"paper"`` or ``"paper-normalized"``.
    - ``isa``, AGQ_FORCE_ISA: the name of a kernel, such as ``"avx2"``.

    Contexts keep their options when the block ends. Raises InputError for an invalid value, and HostError as
    ``register`` does.
    """
    given = {"prune": prune, "act_bits": act_bits, "attention": attention, "isa": isa}
    before = dict(_thread_options.values)
    try:
        for name, value in given.items():
            if value is not None:
                _set_option(name, str(value))
        yield
    finally:
        for name in given:
            if _thread_options.values[name] != before[name]:
                _set_option(name, before[name])


def _set_option(name: str, value: str | None) -> None:
    with registered_library() as library:
        error = library.agq_set_option(_OPTIONS.index(name), None if value is None else value.encode())
        if error:
            raise InputError(error.decode())
    _thread_options.values[name] = value


def last_pruned() -> list[int]:
    """Which tokens of the sequence that this thread computed last were dropped.

    Returns, for each position, the layer after which its token was dropped, or -1 if it was kept.
    """
    with registered_library() as library:
        n = library.agq_last_pruned(None, 0)
        layers = (ctypes.c_int32 * n)()
        library.agq_last_pruned(layers, n)
        return list(layers)


@contextmanager
def silenced(host: Host) -> Iterator[None]:
    """Suppress the line that ggml logs when it loads a backend; warnings still appear."""
    callback, user_data = ctypes.c_void_p(), ctypes.c_void_p()
    host.library.ggml_log_get(ctypes.byref(callback), ctypes.byref(user_data))
    forward = _LOG_CALLBACK(callback.value) if callback.value else None

    def receive(level: int, text: bytes, _data: object) -> None:
        if level == _WARN and forward is not None:
            forward(level, text, user_data)

    keep = _LOG_CALLBACK(receive)
    host.library.ggml_log_set(keep, None)
    try:
        yield
    finally:
        host.library.ggml_log_set(callback, user_data)
