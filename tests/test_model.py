"""Models and contexts of llama.cpp, as the package opens them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
from command_line import run

from agq_gguf.errors import InputError
from agq_gguf.runtime import log
from agq_gguf.runtime.cpus import MAX_THREADS
from agq_gguf.runtime.model import Batch, Model
from agq_gguf.runtime.text import TextModel

TEXT = "the red key in the box and the blue door"
MODELS = {**architectures.DECODERS, **architectures.FIELD, **architectures.GRAPHS}
NOT_KNOWN = {"cohere2", "deepseek2", "gemma2", "gemma3", "gemma3n", "gpt-oss", "mamba", "rwkv7"}  # what a token takes


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", ["f16", "f32"])
def test_a_cache_that_does_not_fit_is_never_made(
    name: str, cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The size that is told before is the size that llama.cpp then tells."""
    path, tokens, sequences = MODELS[name](tmp_path / "m.gguf"), 256, 2
    with Model(path) as model:
        with caplog.at_level("DEBUG", "agq_gguf.llama"):
            model.context(tokens, sequences=sequences, cache=cache).close()
        said = sum(map(float, re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", caplog.text)))
        needed = model.facts.cache_bytes * tokens * sequences * (2 if cache == "f32" else 1)
        if not needed or model._api.llama_model_n_swa(model.handle):
            assert name in NOT_KNOWN
            return
        assert name not in NOT_KNOWN and said == pytest.approx(needed / 2**20, abs=0.006)
        monkeypatch.setattr("agq_gguf.runtime.model.free_memory", lambda: needed)
        model.context(tokens, sequences=sequences, cache=cache).close()
        monkeypatch.setattr("agq_gguf.runtime.model.free_memory", lambda: needed - 1)
        with pytest.raises(InputError, match=r"keys and values of 512 tokens need 0\.0 GiB of memory, 0\.0 GiB are"):
            model.context(tokens, sequences=sequences, cache=cache)
        monkeypatch.setattr("agq_gguf.runtime.model.free_memory", lambda: None)
        model.context(tokens, sequences=sequences, cache=cache).close()


def test_contexts_that_are_too_large(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model(llama_f16) as model, pytest.raises(InputError, match="at most 2147483647 tokens, got 4294967297"):
        model.context(2**32 + 1)
    told: list[str] = []
    monkeypatch.setattr("agq_gguf.runtime.model._LARGE_CACHE", 1)
    TextModel(llama_f16, context=512, threads=1, tell=told.append).close()
    assert len(told) == 1 and told[0].startswith(
        "note: the keys and values of 512 tokens need 0.0 GiB of memory, which"
    )
    if sys.platform == "linux":
        refused = run("generate", llama_f16, "-p", "the", "-c", 2_000_000_000, code=2).stderr
        assert "use a smaller context" in refused and refused.count("\n") == 1
