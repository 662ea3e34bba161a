"""Sends llama.cpp's log to Python's logging, and turns llama.cpp's failures into errors of this package."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from agq_gguf.errors import HostError, InputError
from agq_gguf.runtime.library import llama_api

_NOT_PRUNED = "token pruning is off: "  # how the plugin begins the reason (cpp/prune)
_WARN, _ERROR, _CONTINUE = 3, 4, 5  # enum ggml_log_level


logger = logging.getLogger("agq_gguf.llama")


class _LogRedirect:
    """Redirects the log while it has users: the first one installs our callback, the last one restores the previous."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._level = logging.DEBUG
        self._callback: Any = None
        self._previous: tuple[Any, Any] | None = None
        self.errors: deque[str] = deque(maxlen=8)  # the last lines of level error
        self.warnings: deque[str] = deque(maxlen=8)  # ... and warning
        self.warnings_are_details = False

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            api = llama_api()
            if self._callback is None:
                self._callback = api.llama_log_callback(self._receive)
            previous, user_data = api.llama_log_callback(), ctypes.c_void_p()
            api.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
            self._previous = (previous, user_data)
            api.llama_log_set(self._callback, ctypes.c_void_p())

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._previous is not None:
                llama_api().llama_log_set(*self._previous)

    def _receive(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level != _CONTINUE:
            # llama.cpp logs about a hundred lines of information per model, which are details for our users.
            self._level = {_WARN: logging.WARNING, _ERROR: logging.ERROR}.get(level, logging.DEBUG)
        if line and line.strip("."):
            if self._level == logging.ERROR:
                self.errors.append(line)
            elif self._level == logging.WARNING:
                self.warnings.append(line)
            is_detail = self.warnings_are_details and self._level == logging.WARNING
            logger.log(logging.DEBUG if is_detail else self._level, "%s", line)


redirect = _LogRedirect()


@contextlib.contextmanager
def quiet_log(*, warnings: bool = True) -> Iterator[None]:
    """Sends the log of llama.cpp to the logger ``agq_gguf.llama`` for the duration of the block.

    Without `warnings`, warnings are logged as details.
    """
    redirect.acquire()
    before, redirect.warnings_are_details = redirect.warnings_are_details, not warnings
    try:
        yield
    finally:
        redirect.warnings_are_details = before
        redirect.release()


def last_error(default: str) -> str:
    """The most informative of the last error lines of llama.cpp's log, without the function's name."""
    # What the plugin and the loader say names the cause; llama.cpp then adds which of its functions failed.
    for beginning in ("agq: ", "error loading model", ""):
        lines = [line for line in redirect.errors if beginning in line]
        if lines:
            return lines[-1].split(": ", 1)[-1].removeprefix("error loading model: ")
    return default


def why_not_pruned() -> str:
    """Why the plugin does not prune, as its last warning about it says; empty if there was none."""
    lines = [line for line in redirect.warnings if _NOT_PRUNED in line]
    return lines[-1].split(_NOT_PRUNED, 1)[1] if lines else ""


@contextlib.contextmanager
def llama_errors(what: str) -> Iterator[None]:
    """Turns exceptions of `llama_cpp.Llama` into errors of this package, and redirects the log."""
    with quiet_log():
        redirect.errors.clear()
        try:
            yield
        except RuntimeError as e:  # llama_decode failed
            raise HostError(f"{what}: {last_error(str(e))}") from e
        except (ValueError, AssertionError) as e:  # the file, or too many tokens
            raise InputError(f"{what}: {last_error(str(e))}") from e
