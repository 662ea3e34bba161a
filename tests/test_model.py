"""Models and contexts of llama.cpp, as the package opens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agq_gguf.errors import InputError
from agq_gguf.runtime import log
from agq_gguf.runtime.cpus import MAX_THREADS
from agq_gguf.runtime.model import Batch, Model

TEXT = "the red key in the box and the blue door"


def test_tokens_and_text(llama_f16: Path) -> None:
    with Model(llama_f16) as model:
        tokens = model.tokenize(TEXT)
        assert model.detokenize(tokens[1:]).strip() == TEXT  # the first token begins the text
        assert model.detokenize([]) == ""
        long = np.resize(tokens[1:], 5000)  # more than the first guess at the room
        assert len(model.detokenize(long)) > 5000


def test_an_unfinished_character_is_replaced(llama_f16: Path) -> None:
    with Model(llama_f16) as model:
        tokens = model.tokenize("\N{SNOWMAN}")  # one token for each byte
        assert model.detokenize(tokens[:-1]).endswith("\N{REPLACEMENT CHARACTER}")


def test_closing_twice_and_forgetting(llama_f16: Path) -> None:
    model = Model(llama_f16)
    context = model.context(64)
    batch = Batch(model.tokenize(TEXT))
    context.decode(batch)
    first = context.logits(batch).copy()
    context.forget(1)
    context.decode(Batch(model.tokenize(TEXT)[1:], first_position=1))
    np.testing.assert_allclose(context.logits(batch), first, atol=1e-3)
    for _ in range(2):
        context.close()
        model.close()


def test_a_model_without_logits(bert_f16: Path) -> None:
    with Model(bert_f16) as model, pytest.raises(InputError, match="predicts no next token"):
        model.require_logits()


def test_the_cause_of_a_failure_is_what_the_plugin_said() -> None:
    log.redirect.errors.clear()
    assert log.last_error("status -3") == "status -3"
    log.redirect.errors.append("agq: tensor 'a' is used in a product that the plugin does not support")
    log.redirect.errors.append("graph_compute: ggml_backend_sched_graph_compute_async failed with error -1")
    log.redirect.errors.append("llama_decode: failed to decode, ret = -3")
    assert log.last_error("").startswith("tensor 'a' is used in a product")
    log.redirect.errors.clear()


def test_more_threads_than_ggml_takes(llama_f16: Path) -> None:
    with Model(llama_f16) as model:
        for threads in (-1, MAX_THREADS + 1):
            with pytest.raises(InputError, match=f"threads must be 0 to 512, got {threads}"):
                model.context(64, threads=threads)
        model.context(64, threads=MAX_THREADS).close()
