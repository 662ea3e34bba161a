"""Generates text with `llama_cpp.Llama`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agq_gguf.errors import InputError
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.log import llama_errors
from agq_gguf.runtime.model_file import prepare

if TYPE_CHECKING:
    from llama_cpp import Llama


_CHAT_CONTEXT = 4096  # tokens; the trained context of many models would need gigabytes of cache


def open_llama(path: str | os.PathLike[str], *, context: int = 0, threads: int = 0) -> Llama:
    """Opens a checked file as a `llama_cpp.Llama`, with the plugin if needed.

    `context` 0 means the model's trained context, but at most 4096 tokens. Raises InputError or HostError.
    """
    facts = prepare(path)
    if not facts.causal:
        raise InputError(f"{path}: an encoder model generates no text; use a decoder model")
    llama_api()
    from llama_cpp import Llama

    n_ctx = context or min(facts.n_ctx_train or _CHAT_CONTEXT, _CHAT_CONTEXT)
    threads = threads or default_threads()
    with llama_errors(f"{path}: llama.cpp cannot load this model"):
        return Llama(str(path), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)


def generated_text(
    llama: Llama, prompt: str | list[int], *, tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yields pieces of the text that follows the prompt. Raises InputError or HostError."""
    with llama_errors("cannot generate text"):
        stream: Any = llama.create_completion(
            prompt, max_tokens=tokens, temperature=temperature, seed=seed, stream=True
        )
        for part in stream:
            yield part["choices"][0]["text"]


def chat_answer(
    llama: Llama, messages: list[dict[str, str]], *, tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yields pieces of the assistant's next message. Raises InputError or HostError."""
    with llama_errors("cannot generate an answer"):
        request: Any = messages
        stream: Any = llama.create_chat_completion(
            request, max_tokens=tokens, temperature=temperature, seed=seed, stream=True
        )
        for part in stream:
            yield part["choices"][0]["delta"].get("content") or ""
