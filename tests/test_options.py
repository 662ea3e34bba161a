"""`agq_gguf.options`: what environment variables say, said in Python for the contexts of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agq_gguf
from agq_gguf.errors import InputError
from agq_gguf.runtime.model import Batch, Model

PROMPT = np.random.default_rng(3).integers(3, 400, 80)


def logits(path: Path, **options: Any) -> np.ndarray:
    with Model(path) as model, agq_gguf.options(**options), model.context(128, threads=1) as context:
        batch = Batch(PROMPT)
        context.decode(batch)
        return context.logits(batch).copy()


def variable(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        return logits(path)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("act_bits", 4, "AGQ_ACT_BITS"),
        ("act_bits", "mixed:0.8;layer=0", "AGQ_ACT_BITS"),
        ("attention", "paper", "AGQ_ATTENTION"),
        ("isa", "scalar", "AGQ_FORCE_ISA"),
        ("prune", "0:0.5;min=8", "AGQ_PRUNE"),
    ],
)
def test_an_option_does_what_its_variable_does(
    option: str, value: Any, name: str, llama_agq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = logits(llama_agq)
    with_option = logits(llama_agq, **{option: value})
    np.testing.assert_array_equal(with_option, variable(llama_agq, monkeypatch, name, str(value)))
    assert not np.array_equal(with_option, plain)
    np.testing.assert_array_equal(logits(llama_agq), plain)  # the option ended with its block


def test_an_option_wins_over_its_variable(llama_agq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGQ_ACT_BITS", "4")
    eight = logits(llama_agq, act_bits=8)
    monkeypatch.delenv("AGQ_ACT_BITS")
    np.testing.assert_array_equal(eight, logits(llama_agq))


def test_blocks_nest(llama_agq: Path) -> None:
    plain, four = logits(llama_agq), logits(llama_agq, act_bits=4)
    with agq_gguf.options(act_bits=4):
        np.testing.assert_array_equal(logits(llama_agq, prune="off"), four)
        np.testing.assert_array_equal(logits(llama_agq, act_bits=8), plain)
        np.testing.assert_array_equal(logits(llama_agq), four)
    np.testing.assert_array_equal(logits(llama_agq), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"act_bits": 5}, "AGQ_ACT_BITS"),
        ({"attention": "sparse"}, "AGQ_ATTENTION"),
        ({"isa": "sse9"}, "not a known kernel"),
        ({"act_bits": 4, "prune": "3:2"}, "is not understood"),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(options: dict[str, Any], message: str, llama_agq: Path) -> None:
    plain = logits(llama_agq)
    with pytest.raises(InputError, match=message), agq_gguf.options(**options):
        pass
    np.testing.assert_array_equal(logits(llama_agq), plain)
