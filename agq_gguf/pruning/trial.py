"""Runs a pruning plan on example prompts and measures what it changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import HostError, InputError
from agq_gguf.format.pruning_record import Direction
from agq_gguf.logits import compare
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import (
    MIN_PROMPT,
    Plan,
)
from agq_gguf.runtime.dialogues import tokens_of
from agq_gguf.runtime.log import why_not_pruned
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.runtime.plugin import last_pruned, options
from agq_gguf.runtime.pruned import last_importance
from agq_gguf.text import LoadedText, fair_shares

CALL_TOKENS = 512  # tokens of a prompt and what follows it: llama.cpp's ubatch, within which importance is compared
MAX_PIECES = 64  # of a text
_LOGITS_BYTES = 512 << 20  # maximum size of the unpruned model's logits in memory
_PROMPTS = 16
_CUE = 16  # tokens of the repeated part at the end of a prompt: enough for a model to start copying


@dataclass(frozen=True)
class Example:
    """A prompt and the tokens that follow it in the text; for an echo, the rest of the part that its end repeats."""

    prompt: NDArray[np.int32]
    following: NDArray[np.int32]
    is_echo: bool = False


@dataclass(frozen=True)
class Run:
    """Results of one pass over all examples; lists have one entry for each example."""

    left: list[NDArray[np.int32]]  # the layer after which each prompt token was dropped, or -1
    importance: dict[int, list[NDArray[np.float32]]]  # of the probed layers
    kl: float
    nll: float
    echo_kl: float

    @property
    def cost(self) -> float:
        """The number that choices are compared by."""
        return self.kl + self.echo_kl


Runner = Callable[[Plan, Sequence[int]], Run]  # plan, further layers to compute importance for


def make_examples(tokens: NDArray[np.int32], count: int, following: int, context: int) -> list[Example]:
    """Cuts up to `count` examples from a text, evenly spread; fewer if the text is short.

    Raises InputError if the text or the context is too short.
    """
    length = min(CALL_TOKENS, context) - following
    if length < 2 * MIN_PROMPT:
        raise InputError(
            f"calibrating pruning needs a context of {2 * MIN_PROMPT + following} tokens or more, got {context}"
        )
    room = len(tokens) - length - following
    if room < 0:
        raise InputError(
            f"the text has {len(tokens)} tokens, at least {length + following} are needed; use a longer text"
        )
    starts = np.linspace(0, room, max(2, min(count, 1 + room // following))).astype(np.int64)
    examples = []
    for i, start in enumerate(starts):
        prompt = tokens[start : start + length].copy()
        if i % 2 == 0:
            examples.append(Example(prompt, tokens[start + length : start + length + following]))
            continue
        # Parts from all over the prompts, but not from the end, where tokens are never dropped.
        at = 1 + (i * (length - 3 * following)) // (len(starts) - 1)
        part = prompt[at : at + _CUE + following // 2].copy()
        prompt[-_CUE:] = part[:_CUE]
        examples.append(Example(prompt, part[_CUE:], is_echo=True))
    return examples


class Runtime:
    """Runs the model with the plugin on all examples. The plan of the first run must drop nothing."""

    def __init__(self, model: Model, examples: list[Example], threads: int, progress: Callable[[], None]) -> None:
        self._model, self._examples, self._threads, self._progress = model, examples, threads, progress
        self.directions: dict[int, Direction] = {}  # of a learned score, by layer; the file need not have them
        self._reuse = False
        self._full: list[NDArray[np.float32]] = []  # logits of the unpruned model, for each example

    def __call__(self, plan: Plan, probed: Sequence[int]) -> Run:
        """Runs all examples with this plan."""
        self._reuse = plan.reuse
        size = max(len(e.prompt) + len(e.following) for e in self._examples)
        left: list[NDArray[np.int32]] = []
        importance: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in probed}
        rows: dict[bool, list[NDArray[np.float64]]] = {False: [], True: []}
        with ExitStack() as stack:
            with options(prune=plan.spec(probed, self.directions)):
                context = stack.enter_context(self._model.context(size, n_ubatch=size, threads=self._threads))
            for i, example in enumerate(self._examples):
                logits = self._logits(context, example, left, importance)
                if len(self._full) <= i:
                    self._full.append(logits)
                rows[example.is_echo].append(compare(self._full[i], logits, example.following))
                self._progress()
        _, nll, kl, _ = np.concatenate(rows[False]).T
        echo_kl = np.concatenate(rows[True])[:, 2]
        if not (np.isfinite(nll).all() and np.isfinite(kl).all() and np.isfinite(echo_kl).all()):
            raise InputError(f"{self._model.path}: the logits hold a NaN or an infinity; the weights are damaged")
        return Run(left, importance, float(kl.mean()), float(nll.mean()), float(echo_kl.mean()))

    def _logits(
        self,
        context: Context,
        example: Example,
        left: list[NDArray[np.int32]],
        importance: dict[int, list[NDArray[np.float32]]],
    ) -> NDArray[np.float32]:
        """Logits of the tokens that follow; appends to `left` and `importance` what the prompt's call showed."""
        n = len(example.prompt)
        context.clear()
        prompt = Batch(example.prompt)
        context.decode(prompt)
        left.append(np.array(last_pruned(), np.int32))
        for layer, values in importance.items():
            values.append(last_importance(layer))
        found = [left[-1], *(values[-1] for values in importance.values())]
        if any(len(values) != n for values in found):
            without = "; --no-reuse may work" if self._reuse else ""
            reason = why_not_pruned() or "the plugin did not say why"
            raise HostError(f"{self._model.path}: tokens of this model cannot be pruned: {reason}{without}")
        first = context.logits(prompt)[-1:].copy()
        batch = Batch(example.following[:-1], first_position=n, first_logits=0)
        context.decode(batch)
        return np.concatenate([first, context.logits(batch)])


def examples_of(model: Model, tokens: NDArray[np.int32], choice: PruneOptions) -> list[Example]:
    """Examples from a text: as many as `choice` asks for, but no more than the memory for their logits allows."""
    logits_bytes = 4 * model.n_vocab * choice.following
    count = max(2, min(choice.prompts or _PROMPTS, _LOGITS_BYTES // logits_bytes))
    examples = make_examples(tokens, count, choice.following, model.n_ctx_train)
    if model.add_bos:
        for example in examples:
            example.prompt[0] = model.bos
    return examples


def tokens_of_text(model: Model, text: LoadedText) -> NDArray[np.int32]:
    """The tokens of the text; several texts follow one another, with equal shares as far as they are long."""
    if len(text.parts) == 1 and all(isinstance(piece, str) for piece in text.parts[0]):
        return model.tokenize(text.whole)
    found = [tokens_of(model, part)[0] for part in text.parts]
    lengths = [len(tokens) for tokens in found]
    shares = fair_shares(lengths, max(len(found) * min(lengths), MAX_PIECES * CALL_TOKENS))
    return np.concatenate([tokens[:share] for tokens, share in zip(found, shares, strict=True)])
