"""Keeps Ctrl-C for later while llama.cpp calls Python back.

Python raises KeyboardInterrupt wherever it is just then. Inside a function that C code has called, ctypes prints the
exception and goes on, so the interrupt would be lost.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether somebody has asked to stop."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal's number

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block at whose end KeyboardInterrupt is raised if SIGINT or SIGTERM arrived meanwhile.

        Only in the main thread, which is the one that Python runs signal handlers in.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked = None
        numbers = (signal.SIGINT, signal.SIGTERM)
        # Handlers that do not raise, or that are not Python's, are left alone.
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is signal.default_int_handler}
        for number in before:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked is not None:
            raise KeyboardInterrupt
