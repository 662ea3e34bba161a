"""SIGTERM as an exception, and Ctrl-C kept for later while llama.cpp calls Python back.

Python raises KeyboardInterrupt wherever it is just then. Inside a function that C code has called, ctypes prints the
exception and goes on, so the interrupt would be lost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """Somebody ends the program with SIGTERM; it cleans up as for Ctrl-C, which may mean less than the end."""


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """A handler for SIGTERM."""
    raise Terminated


class Interrupts:
    """Whether somebody has asked to stop."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal's number

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block at whose end a SIGINT or SIGTERM that arrived meanwhile raises its exception.

        Only in the main thread, which is the one that Python runs signal handlers in.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = None
        numbers = (signal.SIGINT, signal.SIGTERM)
        # Handlers that do not raise, or that are not Python's, are left alone.
        raising = (signal.default_int_handler, terminate)
        before = {n: handler for n in numbers if (handler := signal.getsignal(n)) in raising}
        for number in before:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked is not None:
            before[self.asked](self.asked, None)
