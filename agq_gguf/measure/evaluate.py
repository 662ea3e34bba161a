"""Compares a model with its reference: perplexity, KL divergence and agreement, from the logits of both."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress, no_progress
from agq_gguf.errors import InputError
from agq_gguf.logits import compare
from agq_gguf.runtime.dialogues import tokens_of
from agq_gguf.runtime.model import Batch, Context, FlashAttention, Model, check_same_tokens
from agq_gguf.text import LoadedText

DEFAULT_CONTEXT = 512
_ROWS = 32  # positions whose logits are held in binary64 at one time: 33 MB for a vocabulary of 128k


@dataclass(frozen=True)
class Evaluation:
    """Figures over all scored positions; divergences are KL(reference || model) in nats per token."""

    context: int  # tokens of a chunk
    chunks: int
    positions: int  # scored: the second half of each chunk
    perplexity: float
    reference_perplexity: float
    mean_kl: float
    mean_kl_error: float  # standard error of mean_kl
    median_kl: float
    kl_999: float  # the 99.9% percentile
    max_kl: float
    top1_agreement: float  # share of positions where both models find the same token most likely
    kl_percentiles: list[float]  # 0% to 100% in steps of 1%


def evaluate(
    model_path: str | os.PathLike[str],
    reference_path: str | os.PathLike[str],
    text: str | LoadedText,
    *,
    context: int | None = None,
    chunks: int | None = None,
    threads: int = 0,
    flash_attention: FlashAttention = "auto",
    progress: Progress = no_progress,
) -> Evaluation:
    """Compares two models on a text, chunk by chunk, so that memory use does not grow with the text.

    As in llama-perplexity, the text is cut into chunks of `context` tokens (default: 512, or the trained context if
    that is smaller). Each chunk starts with the BOS token if the model uses one, and the positions of its second half
    are scored. `chunks` limits their number. Dialogues in a `LoadedText` are rendered with the model's chat template.
    Raises InputError, or HostError if a model does not run.
    """
    with ExitStack() as stack:
        models = [stack.enter_context(Model(path)) for path in (reference_path, model_path)]
        for model in models:
            model.require_logits()
        check_same_tokens(models)
        size = _default_context(models) if context is None else context
        if size < 4:
            raise InputError(f"chunks must have at least 4 tokens, got {size}")
        pieces = _cut(models[0], text, size, chunks)
        contexts = [
            stack.enter_context(model.context(size, threads=threads, flash_attention=flash_attention))
            for model in models
        ]
        scored = []
        for done, piece in enumerate(pieces):
            progress("evaluate", done, len(pieces), "")
            scored.append(np.concatenate(list(_score_chunk(contexts, piece, models[0]))))
        progress("evaluate", len(pieces), len(pieces), "")
    return summarize(np.concatenate(scored), size, len(pieces))


def check_length(model: Model, text: str | LoadedText) -> None:
    """Raises InputError if the text is too short for `evaluate` with its default context."""
    _cut(model, text, _default_context([model]), 1)


def _default_context(models: list[Model]) -> int:
    return min([DEFAULT_CONTEXT, *(model.n_ctx_train for model in models)])


def _cut(model: Model, text: str | LoadedText, size: int, chunks: int | None) -> NDArray[np.int32]:
    """Token ids [chunk, size]; a last chunk that is too short is left out."""
    tokens = (
        model.tokenize(text) if isinstance(text, str) else np.concatenate([tokens_of(model, p)[0] for p in text.parts])
    )
    n = len(tokens) // size
    if n == 0:
        raise InputError(
            f"the text must have at least {size} tokens (one chunk), got {len(tokens)}; use a longer text or a smaller "
            "--ctx"
        )
    if chunks is not None:
        n = min(n, chunks)
    return tokens[: n * size].reshape(n, size)


def _score_chunk(contexts: list[Context], piece: NDArray[np.int32], model: Model) -> Iterator[NDArray[np.float64]]:
    """Rows of `compare` for the second half of a chunk."""
    first = len(piece) // 2
    inputs = piece.copy()
    if model.add_bos:
        inputs[0] = model.bos
    # The last token is only a target, because no token of the chunk follows it.
    batch = Batch(inputs[:-1], first_logits=first)
    views = []
    for context in contexts:
        context.clear()
        context.decode(batch)
        views.append(context.logits(batch))
    targets = piece[first + 1 :]
    for begin in range(0, len(targets), _ROWS):
        part = slice(begin, begin + _ROWS)
        yield compare(views[0][part], views[1][part], targets[part])


def summarize(scored: NDArray[np.float64], context: int, chunks: int) -> Evaluation:
    """Figures from the rows of `compare`. Raises InputError if the logits of a model are not finite."""
    if not np.isfinite(scored).all():
        bad = "reference" if not np.isfinite(scored[:, 0]).all() else "model"
        raise InputError(f"the logits of the {bad} hold a NaN or an infinity; its weights are damaged")
    reference_nll, nll, kl, agree = scored.T
    n = len(scored)
    return Evaluation(
        context=context,
        chunks=chunks,
        positions=n,
        perplexity=_perplexity(nll),
        reference_perplexity=_perplexity(reference_nll),
        mean_kl=float(kl.mean()),
        mean_kl_error=float(kl.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0,
        median_kl=float(np.median(kl)),
        kl_999=float(np.quantile(kl, 0.999)),
        max_kl=float(kl.max()),
        top1_agreement=float(agree.mean()),
        kl_percentiles=[float(value) for value in np.percentile(kl, np.arange(101))],
    )


def _perplexity(nll: NDArray[np.float64]) -> float:
    """Exponential of the mean; infinite if it overflows, for badly damaged models."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll.mean()))
