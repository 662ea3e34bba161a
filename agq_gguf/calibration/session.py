"""A model open in llama.cpp and its calibration text, shared by all stages that need them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError
from agq_gguf.runtime.dialogues import tokens_of
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.model import Model
from agq_gguf.text import LoadedText, fair_shares, interleaved

MIN_TOKENS = 64  # a shorter text is useless
_MIN_CHUNK = 16
_NO_TOKENIZER = 0  # LLAMA_VOCAB_TYPE_NONE


class Session:
    """The model and the tokens of its calibration text; a context manager. `warnings` are about the text.

    Raises InputError if llama.cpp cannot load the model, if it has no tokenizer, or if the text is too short.
    """

    def __init__(self, path: str | os.PathLike[str], text: Iterable[str]) -> None:
        self.path = Path(path)
        self.model = Model(path)
        try:
            if llama_api().llama_vocab_type(self.model.vocabulary) == _NO_TOKENIZER:  # llama.cpp would abort
                raise InputError(
                    f"{path}: has no tokenizer, so a text cannot be used for calibration; use an imatrix, or no "
                    "calibration"
                )
            found = [tokens_of(self.model, part) for part in (text.parts if isinstance(text, LoadedText) else [text])]
            self._parts = [tokens for tokens, _ in found]
            self.warnings = list(dict.fromkeys(warning for _, warnings in found for warning in warnings))
            total = sum(map(len, self._parts))
            if total < MIN_TOKENS:
                raise InputError(
                    f"the calibration text has {total} tokens, at least {MIN_TOKENS} are needed; use a longer text"
                )
        except BaseException:
            self.model.close()
            raise

    def chunk_size(self, context: int) -> int:
        """Tokens per chunk: `context`, or the model's trained context if that is smaller."""
        return min(context, self.model.n_ctx_train or context)

    def chunks(self, size: int, max_tokens: int, *, equal: bool = False) -> list[NDArray[np.int32]]:
        """Chunks of `size` tokens, spread over the text, with up to `max_tokens` tokens in total.

        Several texts get equal shares as far as they are long, and take turns. Each chunk includes the model's special
        tokens at its ends. The last one of a text may be shorter; with `equal` it begins earlier instead. Raises
        InputError if `size` is too small.
        """
        first, last = self.model.special_ends()
        body = size - len(first) - len(last)
        if body < _MIN_CHUNK:
            raise InputError(
                f"a context of {size} tokens is too small for calibration, at least {size - body + _MIN_CHUNK} are "
                "needed"
            )
        texts = []
        for tokens in self._parts:
            bodies = [tokens[i : i + body] for i in range(0, len(tokens), body)]
            if len(bodies) > 1 and len(bodies[-1]) < body // 4:
                bodies.pop()  # a few words without context are not typical input
            if equal and len(bodies) > 1:
                bodies[-1] = tokens[-body:] if len(bodies[-1]) < body else bodies[-1]
            texts.append(bodies)
        shares = fair_shares([len(bodies) for bodies in texts], max(1, max_tokens // size))
        taken = [[bodies[i * len(bodies) // n] for i in range(n)] for bodies, n in zip(texts, shares, strict=True) if n]
        return [np.concatenate([first, found, last]) for found in interleaved(taken)]

    def close(self) -> None:
        """Frees the model."""
        self.model.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
