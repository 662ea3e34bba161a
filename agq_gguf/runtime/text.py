"""Text generation with `llama_cpp.Llama`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agq_gguf.errors import InputError
from agq_gguf.runtime.library import default_threads, llama_api
from agq_gguf.runtime.log import llama_errors
from agq_gguf.runtime.model_file import prepare

if TYPE_CHECKING:
    from llama_cpp import Llama


_CHAT_CONTEXT = 4096  # tokens; what models are trained for today needs gigabytes of cache


def open_llama(path: str | os.PathLike[str], *, context: int = 0, threads: int = 0) -> Llama:
    """A `llama_cpp.Llama` for text on a checked file, with the plugin where it is needed.

    `context` 0 means what the model was trained for, but not more than 4096 tokens. Raises InputError or HostError.
    """
    facts = prepare(path)
    if not facts.causal:
        raise InputError(f"{path}: an encoder model, it generates no text")
    llama_api()
    from llama_cpp import Llama

    n_ctx = context or min(facts.n_ctx_train or _CHAT_CONTEXT, _CHAT_CONTEXT)
    threads = threads or default_threads()
    with llama_errors(f"{path}: llama.cpp cannot load this model"):
        return Llama(str(path), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False)


def generated_text(
    llama: Llama, prompt: str | list[int], *, tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """The pieces of text that follow the prompt, as they come. Raises InputError or HostError."""
    with llama_errors("no text can be generated"):
        stream: Any = llama.create_completion(
            prompt, max_tokens=tokens, temperature=temperature, seed=seed, stream=True
        )
        for part in stream:
            yield part["choices"][0]["text"]


def chat_answer(
    llama: Llama, messages: list[dict[str, str]], *, tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """The pieces of the assistant's next message, as they come. Raises InputError or HostError."""
    with llama_errors("no answer can be generated"):
        request: Any = messages
        stream: Any = llama.create_chat_completion(
            request, max_tokens=tokens, temperature=temperature, seed=seed, stream=True
        )
        for part in stream:
            yield part["choices"][0]["delta"].get("content") or ""
