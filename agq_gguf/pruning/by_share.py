"""Calibrates by a share of the work to save: the setting that changes the model's predictions least.

Prompts are cut from the text. Every second prompt ends by repeating the beginning of an earlier part, as a question at
the end of a prompt does. The plugin runs them with pruning, as it will later. The predictions for the 64 tokens that
follow (or for the rest of the repeated part) are compared with those of the model without pruning. See
docs/pruning-design.md, "How calibration saves a share".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress
from agq_gguf.errors import AgqError, HostError, InputError, missing_package
from agq_gguf.format import pruning_record
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.pruning.file import carriers
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import Work, work_of
from agq_gguf.pruning.report import PruneReport
from agq_gguf.pruning.search import Point, choose
from agq_gguf.pruning.trial import CALL_TOKENS, Example, Runtime, examples_of, tokens_of_text
from agq_gguf.pruning.windows import window_of, windowed_layers
from agq_gguf.runtime.model import Model
from agq_gguf.text import LoadedText

_FAR_SIGHTED = {"first", "recent"}  # scores that give tokens outside a sliding window nothing


def by_share(
    src: str | os.PathLike[str],
    loaded: LoadedText,
    choice: PruneOptions,
    allowed: Sequence[int],
    work: Work,
    sizes: dict[str, int],
    held_by: dict[int, str],
    progress: Progress,
) -> PruneReport:
    """The setting of the file `src` that saves the share at which the predictions change least.

    `allowed` are the layers that can prune, `sizes` the elements of the tensors, and `held_by` the tensor of each layer
    that can hold its record. Raises InputError or HostError if no way of pruning can save it.
    """
    found: list[tuple[tuple[Point, list[Point], float], _Holders]] = []
    refused: list[AgqError] = []
    with Model(src) as model:
        model.require_logits()
        tokens = tokens_of_text(model, loaded)
        examples = examples_of(model, tokens, choice)
        ways = choice.ways()
        with open_model(src) as reader:
            blind = windowed_layers(model, range(work.n_layer - 1), window_of(reader), choice.threads)
        run = _counted(model, examples, work, allowed, choice, len(ways), progress)
        for way in ways:
            try:
                holders = _Holders(held_by, {})
                if way.score and pruning_record.score_named(way.score).has_direction:
                    holders = _learned(src, model, tokens, allowed, way, progress)
                run.directions = holders.directions
                layers = sorted(set(allowed) & set(holders.tensors))
                if way.score in _FAR_SIGHTED and not way.layers:
                    layers = [layer for layer in layers if layer not in blind] or layers
                found.append((choose(run, work_of(sizes, bool(way.reuse)), layers, way), holders))
            except (InputError, HostError) as e:  # too large a share, or not supported; another way may succeed
                refused.append(e)
        if not found:
            raise refused[0]
        (chosen, curve, nll), holders = min(found, key=lambda tried: tried[0][0].kl + tried[0][0].echo_kl)
    origin = f"{loaded.name}, {len(examples)} prompts of {len(examples[0].prompt)} tokens"
    held = {layer: holders.tensors[layer] for layer in chosen.plan.layers}
    return PruneReport(chosen, curve, nll, origin, held, directions=holders.directions)


@dataclass(frozen=True)
class _Holders:
    """For each layer: the tensor that holds its record, and the direction of a learned score."""

    tensors: dict[int, str]
    directions: dict[int, pruning_record.Direction]


def _learned(
    src: str | os.PathLike[str],
    model: Model,
    tokens: NDArray[np.int32],
    allowed: Sequence[int],
    way: PruneOptions,
    progress: Progress,
) -> _Holders:
    """Learned directions of all layers whose tensors have room for them.

    Raises InputError if none has, HostError without torch, which only this score needs.
    """
    try:
        from agq_gguf.pruning.learn import learn_directions
    except ImportError as e:
        raise missing_package("the score 'learned'", e, "convert") from e
    length = min(CALL_TOKENS, model.n_ctx_train) - way.following
    found = learn_directions(
        model,
        tokens,
        allowed,
        following=way.following,
        length=length,
        threads=way.threads,
        progress=lambda done, total: progress("learn", done, total, "importance of tokens"),
    )
    with open_model(src) as reader:
        tensors = carriers(reader, pruning_record.pruning_bytes(channels=max(map(len, found.values()))))
    if not set(tensors) & set(found):
        raise InputError(f"{src}: no AGQ4 matrix has room for the score {way.score!r}; choose another with --score")
    return _Holders(tensors, {layer: pruning_record.Direction.of(found[layer]) for layer in tensors if layer in found})


def _counted(
    model: Model,
    examples: list[Example],
    work: Work,
    allowed: Sequence[int],
    choice: PruneOptions,
    n_ways: int,
    progress: Progress,
) -> Runtime:
    """The runtime, with progress counted in prompts, out of all that may be needed."""
    per_size = [
        size * (choice.candidates if size == 1 else 2 * choice.candidates) for size in range(1, choice.max_layers + 1)
    ]
    n_layers = len(choice.layers) if choice.layers else choice.max_layers
    curve = (len(choice.curve) + 1) * n_layers
    total = len(examples) * (1 + curve + (0 if choice.layers else sum(per_size))) * n_ways
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress("prune", min(done, total), total, "choosing layers and thresholds")

    return Runtime(model, examples, choice.threads, count)
