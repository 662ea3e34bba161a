"""Ctrl-C while llama.cpp calls Python back is not lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agq_gguf.runtime import log
from agq_gguf.runtime.interrupts import Interrupts, Terminated, terminate
from agq_gguf.runtime.model import Batch, Model


@pytest.fixture
def raising() -> Iterator[None]:
    """Both signals raise an exception, as in the command line."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_a_callback(number: signal.Signals, llama_f16: Path) -> None:
    seen = []

    def on_node(address: int, ask: bool) -> bool:
        seen.append(address)
        if len(seen) == 10:
            os.kill(os.getpid(), number)
        return False

    with Model(llama_f16) as model, model.context(64, threads=1, eval_callback=on_node) as context:
        batch = Batch(model.tokenize("the red key in the box"))
        with pytest.raises(KeyboardInterrupt) as raised:
            context.decode(batch)
        assert isinstance(raised.value, Terminated) == (number == signal.SIGTERM)
        assert 10 <= len(seen) < 15  # nobody was called any more
        context.clear()
        context.decode(batch)  # the next call runs
    assert signal.getsignal(number) is (terminate if number == signal.SIGTERM else signal.default_int_handler)


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("what", ["load", "context"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_log(
    number: signal.Signals, what: str, llama_f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp logs while it loads a model and makes a context."""
    sent: list[int] = []

    def receive(*_: object) -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    with Model(llama_f16) as model:
        monkeypatch.setattr(log.logger, "log", receive)
        with pytest.raises(KeyboardInterrupt) as raised:
            if what == "context":
                model.context(64, threads=1)
            else:
                Model(llama_f16)
        assert sent and isinstance(raised.value, Terminated) == (number == signal.SIGTERM)


def test_other_handlers_and_threads_are_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with Interrupts().deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)

    def elsewhere() -> None:
        with Interrupts().deferred():
            heard.append(0)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard[-1] == 0
