"""Continues texts and conversations with a loaded model."""

from __future__ import annotations

import codecs
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError
from agq_gguf.runtime.chat_format import Prompt, prompt_tokens
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.model import Batch, Context, Model

_CONTEXT = 4096  # tokens, at most; the trained context of many models would need gigabytes of cache
_TOP_K, _TOP_P, _MIN_P = 40, 0.95, 0.05  # as llama-cpp-python has them


class TextModel:
    """A model that continues texts. It keeps what it has read, so that a text with the same beginning is quick."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        context: int = 0,
        threads: int = 0,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Opens a model. `context` 0 means the trained context, but at most 4096 tokens; `threads` 0, all CPUs.

        `tell` gets a line if that takes long.

        Raises InputError for a model that does not generate text, or that does not support the context; HostError.
        """
        self.model = Model(path)
        try:
            self.model.require_logits()
            n_ctx = context or min(self.model.n_ctx_train or _CONTEXT, _CONTEXT)
            self.context: Context = self.model.context(n_ctx, n_batch=min(n_ctx, 512), threads=threads, tell=tell)
        except BaseException:
            self.model.close()
            raise
        self.n_batch = min(n_ctx, 512)  # tokens per call
        self.limit = min(n_ctx, self.model.facts.positions or n_ctx)  # tokens of prompt and answer
        self._read: NDArray[np.int32] = np.zeros(0, np.int32)  # what the cache holds; after an interrupt, its beginning

    def tokenize(self, prompt: str | Prompt) -> NDArray[np.int32]:
        """Tokens of a text, or of a formatted conversation."""
        if isinstance(prompt, str):
            return self.model.tokenize(prompt)
        return prompt_tokens(self.model, prompt.text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included; a leading space stays."""
        return b"".join(self.model.bytes_of(token) for token in tokens).decode("utf-8", "replace")

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Reads a text from its beginning and returns the logits [vocabulary] after it.

        Raises InputError if it is empty or longer than the context.
        """
        if not len(tokens):
            raise InputError(f"{self.model.path}: the prompt is empty; give a text that the model can continue")
        if len(tokens) > self.limit:
            raise InputError(
                f"{self.model.path}: the prompt has {len(tokens)} tokens, expected 1 to {self.limit}; shorten it or "
                "use a larger --ctx"
            )
        same = min(len(self._read), len(tokens) - 1)
        differs = np.flatnonzero(self._read[:same] != tokens[:same])
        known = int(differs[0]) if len(differs) else same
        self._read = self._read[:known]
        # Always, because the cache may hold more: Ctrl-C is raised when a call has returned, before we note its tokens.
        if not self.context.forget(known):
            known, self._read = 0, self._read[:0]  # a recurrent state cannot be taken back
            self.context.clear()
        return self._decode(tokens[known:])

    def _decode(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        for begin in range(0, len(tokens), self.n_batch):
            part = tokens[begin : begin + self.n_batch]
            batch = Batch(part, first_position=len(self._read))
            self.context.decode(batch)
            self._read = np.concatenate([self._read, part])
        return self.context.logits(batch)[-1]

    def continued(
        self, prompt: str | Prompt | NDArray[np.int32], *, tokens: int, temperature: float, seed: int = -1
    ) -> Iterator[str]:
        """Yields pieces of the text that follows the prompt: at most so many `tokens`, and what the context holds.

        `temperature` 0 means always the most likely token; `seed` -1, a new one each time.
        """
        ids = prompt if isinstance(prompt, np.ndarray) else self.tokenize(prompt)
        stops = prompt.stops if isinstance(prompt, Prompt) else ()
        self.read(ids)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held = ""  # may be the beginning of a stop
        with _Sampler(self.context, temperature, seed) as sampler:
            for n in range(tokens):
                token = sampler.next()
                if self.model.ends(token):
                    break
                held += decoder.decode(self.model.bytes_of(token, special=False))
                found = [held.find(stop) for stop in stops if stop in held]
                if found:
                    yield held[: min(found)]
                    return
                keep = max((_overlap(held, stop) for stop in stops), default=0)
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
                if len(self._read) >= self.limit or n == tokens - 1:
                    break
                self._decode(np.array([token], np.int32))
        yield held + decoder.decode(b"", final=True)

    def close(self) -> None:
        """Frees the model."""
        self.context.close()
        self.model.close()

    def __enter__(self) -> TextModel:
        """Returns the object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Sampler:
    """llama.cpp's chain of samplers."""

    def __init__(self, context: Context, temperature: float, seed: int) -> None:
        self._api: Any = llama_api()
        self._context = context
        self._chain = self._api.llama_sampler_chain_init(self._api.llama_sampler_chain_default_params())
        if temperature <= 0:
            steps = [self._api.llama_sampler_init_greedy()]
        else:
            steps = [
                self._api.llama_sampler_init_top_k(_TOP_K),
                self._api.llama_sampler_init_top_p(_TOP_P, 1),
                self._api.llama_sampler_init_min_p(_MIN_P, 1),
                self._api.llama_sampler_init_temp(temperature),
                self._api.llama_sampler_init_dist(secrets.randbits(32) if seed < 0 else seed & 0xFFFFFFFF),
            ]
        for step in steps:
            self._api.llama_sampler_chain_add(self._chain, step)

    def next(self) -> int:
        """A token by the logits of the last call; it counts as chosen."""
        return int(self._api.llama_sampler_sample(self._chain, self._context.handle, -1))

    def __enter__(self) -> _Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_sampler_free(self._chain)
