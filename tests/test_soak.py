"""A soak: one context lives through a random mix of everything an app does, and is compared with fresh ones.

The operations of the long-lived context since it was last emptied are written down; a fresh context that repeats them
must give the same logits, bit for bit. The slow test runs for `AGQ_SOAK_SECONDS` (60 by default) and prints what it did
(`pytest -s`); with `AGQ_SOAK_HOURS` it runs until it has done what a busy machine does in as many hours.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from test_plugin import ALL_AGQ4

import agq_gguf
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.log import quiet_log

N_CTX, N_UBATCH, VOCABULARY = 512, 64, 512

# An hour of a machine that answers without a pause. What wears is the number of calls and of tokens, so it is counted
# in these: a model of 1.1B parameters reads 535 and writes 34 tokens a second (README), and an exchange is taken as 512
# tokens read and 128 written, that is 4.7 seconds. Per exchange the machine keeps and fetches the state of one chat,
# copies a sequence, and checks a draft; a context of 4096 tokens is full after six, and shifted.
EXCHANGES = int(3600 / (512 / 535 + 128 / 34))
HOUR = {
    "tokens read": 512 * EXCHANGES,
    "tokens written": 128 * EXCHANGES,
    "save": EXCHANGES,
    "restore": EXCHANGES,
    "branch": EXCHANGES,
    "speculate": EXCHANGES,
    "shift": EXCHANGES // 6,
}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    agq_gguf.register()
    with quiet_log():
        yield


class Session:
    """Two sequences in one context of llama.cpp's C API. Every operation returns logits, or nothing."""

    def __init__(self, model: Any):
        self.api = api = llama_api()
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = N_CTX
        parameters.n_ubatch, parameters.n_seq_max, parameters.kv_unified = N_UBATCH, 2, True
        parameters.n_threads = parameters.n_threads_batch = 1
        self.context = api.llama_init_from_model(model, parameters)
        assert self.context
        self.memory = api.llama_get_memory(self.context)
        self.tokens: list[int] = []  # of sequence 0
        self.saved: tuple[bytes, list[int]] | None = None

    def _decode(self, tokens: list[int], sequence: int, first: int, all_logits: bool) -> np.ndarray:
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, sequence
            batch.logits[i] = all_logits or i == len(tokens) - 1
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        assert status == 0, status
        n = len(tokens) if all_logits else 1
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (n, VOCABULARY)).copy()

    def prompt(self, tokens: list[int]) -> np.ndarray:
        """Adds a prompt."""
        self.tokens += tokens
        return self._decode(tokens, 0, len(self.tokens) - len(tokens), False)

    def generate(self, n: int) -> np.ndarray:
        """Adds the likeliest tokens, one at a time."""
        logits, token = np.empty((0, VOCABULARY), np.float32), self.tokens[-1]
        for _ in range(n):
            logits = self.prompt([token])
            token = int(logits[0].argmax())
        return logits

    def speculate(self, draft: list[int]) -> np.ndarray:
        """Verifies a draft in one batch, keeps the part that the model would have said, and removes the rest."""
        first = len(self.tokens)
        logits = self._decode(draft, 0, first, True)
        kept = 1
        while kept < len(draft) and int(logits[kept - 1].argmax()) == draft[kept]:
            kept += 1
        assert self.api.llama_memory_seq_rm(self.memory, 0, first + kept, -1)
        self.tokens += draft[:kept]
        return logits

    def shift(self, keep: int, drop: int) -> None:
        """Context shift: forgets tokens behind the first few and moves the rest up."""
        assert self.api.llama_memory_seq_rm(self.memory, 0, keep, keep + drop)
        self.api.llama_memory_seq_add(self.memory, 0, keep + drop, -1, -drop)
        del self.tokens[keep : keep + drop]

    def branch(self, tokens: list[int]) -> np.ndarray:
        """Copies the sequence, goes on in the copy, and drops it."""
        self.api.llama_memory_seq_cp(self.memory, 0, 1, -1, -1)
        logits = self._decode(tokens, 1, len(self.tokens), False)
        assert self.api.llama_memory_seq_rm(self.memory, 1, -1, -1)
        return logits

    def save(self) -> None:
        """Keeps the whole state."""
        size = self.api.llama_state_get_size(self.context)
        buffer = (ctypes.c_uint8 * size)()
        n = self.api.llama_state_get_data(self.context, buffer, size)
        self.saved = bytes(buffer[:n]), list(self.tokens)

    def restore(self) -> None:
        """Goes back to what was kept, if anything was."""
        if self.saved is None:
            return
        data, self.tokens = self.saved[0], list(self.saved[1])
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        assert self.api.llama_state_set_data(self.context, buffer, len(data)) > 0

    def close(self) -> None:
        self.api.llama_free(self.context)


def next_operation(session: Session, choose: random.Random) -> tuple[str, tuple[Any, ...]]:
    """What an app might do next; the context never overflows."""
    used, room = len(session.tokens), N_CTX - len(session.tokens) - 1

    def text(most: int) -> list[int]:
        return [choose.randrange(3, 400) for _ in range(choose.randint(1, most))]

    if used == 0:
        return "prompt", (text(200),)
    if room < 100 or (used > 60 and choose.random() < 0.1):
        keep = choose.randint(1, 8)
        return "shift", (keep, choose.randint(20, used - keep - 10))
    kind = choose.choice(["prompt", "prompt", "generate", "generate", "speculate", "branch", "save", "restore"])
    if kind == "prompt":
        return kind, (text(min(150, room)),)
    if kind == "generate":
        return kind, (choose.randint(1, 12),)
    if kind == "speculate":
        return kind, (text(8),)
    if kind == "branch":
        return kind, (text(30),)
    return kind, ()


def resident() -> int:
    """Bytes that this process occupies."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]


def work(name: str, arguments: tuple[Any, ...]) -> Counter[str]:
    """What an operation adds to the count."""
    if name == "generate":
        return Counter({name: 1, "tokens written": arguments[0]})
    return Counter({name: 1, "tokens read": len(arguments[0]) if name in ("prompt", "speculate", "branch") else 0})


def soak(path: Path, seconds: float, least: Mapping[str, float], seed: int) -> Counter[str]:
    """Runs the mix for `seconds` and until all of `least` is done; returns how often each operation came."""
    api = llama_api()
    model = api.llama_model_load_from_file(os.fsencode(path), api.llama_model_default_params())
    session, choose, counts = Session(model), random.Random(seed), Counter[str]()
    since_empty: list[tuple[str, tuple[Any, ...]]] = []
    logits = None
    end, before, most = time.monotonic() + seconds, 0, 0
    try:
        while time.monotonic() < end or any(counts[name] < n for name, n in least.items()):
            operations = choose.randint(20, 60)
            while operations > 0 or len(session.tokens) > N_CTX - 50:  # the probe needs room, too
                operations -= 1
                name, arguments = next_operation(session, choose)
                logits = getattr(session, name)(*arguments)
                since_empty.append((name, arguments))
                counts += work(name, arguments)
            probe = [choose.randrange(3, 400) for _ in range(20)]
            found = session.branch(probe)
            fresh = Session(model)
            for name, arguments in since_empty:
                wanted = getattr(fresh, name)(*arguments)
            if logits is not None:
                np.testing.assert_array_equal(logits, wanted)
            assert fresh.tokens == session.tokens
            np.testing.assert_array_equal(found, fresh.branch(probe))
            # Emptied, the old context is as good as a new one.
            api.llama_memory_clear(session.memory, True)
            session.tokens, session.saved, since_empty = [], None, []
            fresh.close()
            fresh = Session(model)
            np.testing.assert_array_equal(session.prompt(probe), fresh.prompt(probe))
            fresh.close()
            since_empty.append(("prompt", (probe,)))
            counts["fresh contexts"] += 2
            if counts["fresh contexts"] == 4:
                before = resident()
            most = max(most, resident())
        assert resident() - before < 8 << 20, "memory grew"
        counts["bytes grown"] = most - before
    finally:
        session.close()
        api.llama_model_free(model)
    return counts


@pytest.fixture(scope="module")
def model(models: Path) -> Path:
    source = tiny_models.write_llama(models / "soak-f32.gguf", dtype="f32", n_ff=384, vocab=VOCABULARY)
    quantize(source, models / "soak-agq4.gguf", options=ALL_AGQ4)
    return models / "soak-agq4.gguf"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_short_soak(model: Path) -> None:
    counts = soak(model, 0, {"fresh contexts": 6}, random.randrange(2**32))
    assert sum(counts[name] > 0 for name in (*HOUR, "prompt", "generate")) >= 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_soak(model: Path) -> None:
    hours, seed = float(os.environ.get("AGQ_SOAK_HOURS", "0")), random.randrange(2**32)
    least = {"fresh contexts": 20} | {name: n * hours for name, n in HOUR.items()}
    seconds = float(os.environ.get("AGQ_SOAK_SECONDS", "0" if hours else "60"))
    print(f"seed {seed}, at least", least)
    counts = soak(model, seconds, least, seed)
    print(dict(counts))
    assert min(counts[name] for name in (*HOUR, "prompt", "generate")) > 5, counts
