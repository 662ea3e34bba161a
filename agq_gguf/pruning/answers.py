"""Reads prompts with known answers in the plugin, with and without pruning, and sees which answers are still right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import HostError
from agq_gguf.pruning.heads import Seen
from agq_gguf.pruning.planted import Planted
from agq_gguf.runtime.log import why_not_pruned
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.runtime.plugin import last_pruned, options
from agq_gguf.runtime.pruned import last_head_weights

OFF = "off"


@dataclass(frozen=True)
class Answers:
    """The answers to prompts with one setting; arrays have one entry for each prompt."""

    right: NDArray[np.bool_]  # whether every token of the answer was the likeliest
    seconds: NDArray[np.float64]  # of the prompt
    left: list[NDArray[np.int32]]  # the layer after which each prompt token was dropped, or -1


class Questions:
    """Prompts with known answers, each of which is read in one call, as with a large enough ubatch."""

    def __init__(self, model: Model, prompts: Sequence[Planted], threads: int, progress: Callable[[], None]) -> None:
        self._model, self.prompts, self._threads, self._progress = model, prompts, threads, progress
        self._size = max(len(p.prompt) + len(p.reply) + len(p.answer) for p in prompts)

    def see(self, layers: Sequence[int]) -> tuple[list[Seen], NDArray[np.bool_]]:
        """What the heads of these layers (0, 1, ... in order) see in each prompt, and which answers are right."""
        probing = ",".join(f"{layer}:t0" for layer in layers) + ";score=heads;heads=all"
        found: list[Seen] = []
        right: list[bool] = []
        with self._context(probing) as context:
            for prompt in self.prompts:
                self._read(context, prompt)
                weights = np.array([_heads_of(layer, len(prompt.prompt)) for layer in layers], np.float16)
                if not weights.size:
                    reason = why_not_pruned() or "the plugin did not say why"
                    raise HostError(f"{self._model.path}: tokens of this model cannot be pruned: {reason}")
                found.append(Seen(prompt.prompt, prompt.value, prompt.tail, weights))
                right.append(self._is_right(context, prompt))
                self._progress()
        return found, np.array(right)

    def ask(self, specs: Sequence[str]) -> list[Answers]:
        """The answers under each of these settings. Prompts are read in turns, so that times can be compared."""
        with ExitStack() as stack:
            contexts = [stack.enter_context(self._context(spec)) for spec in specs]
            rows = [[self._ask(context, prompt) for context in contexts] for prompt in self.prompts]
        found = []
        for column in zip(*rows, strict=True):
            right, seconds, left = zip(*column, strict=True)
            found.append(Answers(np.array(right), np.array(seconds), list(left)))
        return found

    def _context(self, spec: str) -> Context:
        with options(prune=spec):
            return self._model.context(self._size, n_ubatch=self._size, threads=self._threads)

    def _read(self, context: Context, prompt: Planted) -> float:
        context.clear()
        begun = perf_counter()
        context.decode(Batch(prompt.prompt))
        return perf_counter() - begun

    def _ask(self, context: Context, prompt: Planted) -> tuple[bool, float, NDArray[np.int32]]:
        seconds = self._read(context, prompt)
        left = np.array(last_pruned(), np.int32)
        right = self._is_right(context, prompt)
        self._progress()
        return right, seconds, left

    def _is_right(self, context: Context, prompt: Planted) -> bool:
        """Reads the reply and the answer after the prompt."""
        following = np.concatenate([prompt.reply, prompt.answer])[:-1]
        batch = Batch(following, first_position=len(prompt.prompt), first_logits=0)
        context.decode(batch)
        likeliest = context.logits(batch)[len(prompt.reply) - 1 :].argmax(-1)
        return bool((likeliest == prompt.answer).all())


def _heads_of(layer: int, tokens: int) -> list[NDArray[np.float32]]:
    found: list[NDArray[np.float32]] = []
    while len(weights := last_head_weights(layer, len(found))) == tokens:
        found.append(weights)
    return found
