"""Compares a model made for embeddings with its reference: how far they turn, and whether neighbours stay the same."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import PathName, Progress, no_progress
from agq_gguf.errors import InputError
from agq_gguf.runtime.model import Batch, Context, FlashAttention, Model, check_same_tokens
from agq_gguf.text import LoadedText

DEFAULT_CONTEXT = 128  # tokens of a text: a paragraph, as encoders are used


@dataclass(frozen=True)
class EmbeddingEvaluation:
    """Figures over all texts; the distance of two embeddings is 1 - cosine."""

    context: int  # tokens of a text, with the model's special tokens
    chunks: int  # texts
    mean_distance: float  # of the model's embedding from the reference's; over tokens, if the model does not pool them
    mean_distance_error: float  # standard error of mean_distance
    median_distance: float
    max_distance: float
    nearest_kept: float | None  # share of the texts whose nearest other text is the same; None with fewer than 3 texts


def evaluate_embeddings(
    model_path: PathName,
    reference_path: PathName,
    text: str | LoadedText,
    *,
    context: int | None = None,
    chunks: int | None = None,
    threads: int = 0,
    flash_attention: FlashAttention = "auto",
    progress: Progress = no_progress,
) -> EmbeddingEvaluation:
    """Compares the embeddings of two models on a text that is cut into texts of `context` tokens (default: 128, or
    fewer if a model allows only fewer).

    `chunks` limits their number. Raises InputError, or HostError if a model does not run.
    """
    with ExitStack() as stack:
        models = [stack.enter_context(Model(path)) for path in (reference_path, model_path)]
        for model in models:
            if not model.facts.embeds:
                raise InputError(f"{model.path}: generates text; embeddings are compared of models that make them")
        check_same_tokens(models)
        limits = [model.n_ctx_train for model in models if model.n_ctx_train]
        size = min([DEFAULT_CONTEXT, *limits]) if context is None else context
        pieces = _cut(models[0], text, size)[:chunks]
        contexts = [
            stack.enter_context(
                model.context(
                    size, n_ubatch=size, threads=threads, flash_attention=flash_attention, embeddings="pooled"
                )
            )
            for model in models
        ]
        found: list[list[NDArray[np.float64]]] = []
        for done, piece in enumerate(pieces):
            progress("evaluate", done, len(pieces), "")
            found.append([_embed(each, piece) for each in contexts])
        progress("evaluate", len(pieces), len(pieces), "")
    references, ours = zip(*found, strict=True)
    return summarize(references, ours, size)


def _cut(model: Model, text: str | LoadedText, size: int) -> list[NDArray[np.int32]]:
    """Texts of `size` tokens with the model's special tokens around each; a last one that is too short is left out."""
    first, last = model.special_ends()
    body = size - len(first) - len(last)
    if body < 1:
        raise InputError(f"texts must have at least {size - body + 1} tokens, got {size}")
    tokens = model.tokenize(text if isinstance(text, str) else text.whole, add_special=False)
    if len(tokens) < body:
        raise InputError(
            f"the text must have at least {body} tokens, got {len(tokens)}; use a longer text or a smaller --ctx"
        )
    return [
        np.concatenate([first, tokens[i : i + body], last]).astype(np.int32)
        for i in range(0, len(tokens) - body + 1, body)
    ]


def _embed(context: Context, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
    """The embedding [1, n], or one for each token [T, n] if the model does not pool them."""
    context.clear()
    batch = Batch(tokens, first_logits=0)
    context.run(batch)
    return context.embeddings(batch).astype(np.float64)


def summarize(
    references: tuple[NDArray[np.float64], ...], ours: tuple[NDArray[np.float64], ...], context: int
) -> EmbeddingEvaluation:
    """Figures of embeddings [1 or tokens, n], text by text. Raises InputError if some are not finite."""
    for which, vectors in (("reference", references), ("model", ours)):
        if not all(np.isfinite(v).all() for v in vectors):
            raise InputError(f"the embeddings of the {which} hold a NaN or an infinity; its weights are damaged")
    pairs = zip(references, ours, strict=True)
    distances = np.concatenate([np.maximum(1 - (_unit(a) * _unit(b)).sum(-1), 0.0) for a, b in pairs])
    n = len(distances)
    kept = None
    if len(ours) > 2:
        before, after = (_nearest(np.stack([v.mean(0) for v in vectors])) for vectors in (references, ours))
        kept = float((before == after).mean())
    return EmbeddingEvaluation(
        context=context,
        chunks=len(ours),
        mean_distance=float(distances.mean()),
        mean_distance_error=float(distances.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0,
        median_distance=float(np.median(distances)),
        max_distance=float(distances.max()),
        nearest_kept=kept,
    )


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors [.., n] of length 1; zero stays zero."""
    length: NDArray[np.float64] = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return x / length


def _nearest(vectors: NDArray[np.float64]) -> NDArray[np.intp]:
    """For each vector [T, n] the number of the other one with the largest cosine."""
    unit = _unit(vectors)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.argmax(-1)
