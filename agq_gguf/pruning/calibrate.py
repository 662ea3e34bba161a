"""Chooses pruning layers and thresholds by running the model on a text, and writes them into the file.

Prompts are cut from the text. Every second prompt ends by repeating the beginning of an earlier part, as a question at
the end of a prompt does. The plugin runs them with pruning, as it will later. The predictions for the 64 tokens that
follow (or for the rest of the repeated part) are compared with those of the model without pruning. See
docs/pruning-design.md, "How calibration chooses".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress, Text, no_progress
from agq_gguf.errors import AgqError, FormatError, HostError, InputError
from agq_gguf.format import pruning_record
from agq_gguf.gguf_io.metadata import PRUNE_LAYERS, PRUNE_PREFIX
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.writer import check_writable
from agq_gguf.pruning.file import carriers, write_plan
from agq_gguf.pruning.learn import MAX_PIECES, learn_directions
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import (
    Plan,
    Work,
    work_of,
)
from agq_gguf.pruning.search import Point, choose
from agq_gguf.pruning.trial import CALL_TOKENS, Example, Runtime, examples_of
from agq_gguf.runtime.dialogues import tokens_of
from agq_gguf.runtime.model import Model
from agq_gguf.text import LoadedText, fair_shares, load_text


@dataclass(frozen=True)
class PruneReport:
    """Result of a calibration."""

    chosen: Point
    curve: list[Point]
    nll: float  # of the tokens that follow, without pruning
    origin: str  # the calibration text and prompts
    carriers: dict[int, str] = field(default_factory=dict)  # layer -> the tensor that holds its record


def calibrate_pruning(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    calibration: Text | None = None,
    choice: PruneOptions | None = None,
    progress: Progress = no_progress,
) -> PruneReport | None:
    """Chooses which tokens the AGQ4 model `src` drops to save a share of the work, and writes the result to `dst`.

    `dst` may be `src`; it is replaced only when the new file is complete. `calibration` is the path of a text file, or
    strings of text, similar to what the model will read. With a share of 0 the pruning is removed from the model; that
    needs no text and returns None. Raises InputError, FormatError, HostError or OutputError, and then leaves `dst`
    unchanged.
    """
    choice = choice or PruneOptions()
    check_writable(dst)
    with open_model(src) as reader:
        held_by = carriers(reader)
        if choice.share == 0:
            write_plan(reader, dst, {}, {}, progress)
            return None
        if calibration is None:
            raise InputError("calibrating pruning needs a text; give one with --calibration")
        if not held_by:
            raise FormatError(f"{src}: has no AGQ4 matrix with room for a pruning record; quantize the model first")
        sizes = {name: tensor.n_elements for name, tensor in reader.tensors.items()}
    work = work_of(sizes)
    allowed = sorted(layer for layer in held_by if layer < work.n_layer - 1)
    if choice.layers and (missing := sorted(set(choice.layers) - set(allowed))):
        known = ", ".join(map(str, allowed)) or "none"
        raise InputError(f"{src}: layer {missing[0]} cannot be a pruning layer; possible layers: {known}")
    loaded = load_text(calibration)
    found: list[tuple[tuple[Point, list[Point], float], _Holders]] = []
    refused: list[AgqError] = []
    with Model(src) as model:
        model.require_logits()
        tokens = _tokens(model, loaded)
        examples = examples_of(model, tokens, choice)
        ways = choice.ways()
        run = _counted(model, examples, work, allowed, choice, len(ways), progress)
        for way in ways:
            try:
                holders = _Holders(held_by, {})
                if way.score and pruning_record.score_named(way.score).has_direction:
                    holders = _learned(src, model, tokens, allowed, way, progress)
                run.directions = holders.directions
                layers = sorted(set(allowed) & set(holders.tensors))
                found.append((choose(run, work_of(sizes, bool(way.reuse)), layers, way), holders))
            except (InputError, HostError) as e:  # too large a share, or not supported; another way may succeed
                refused.append(e)
        if not found:
            raise refused[0]
        (chosen, curve, nll), holders = min(found, key=lambda tried: tried[0][0].kl + tried[0][0].echo_kl)
    origin = f"{loaded.name}, {len(examples)} prompts of {len(examples[0].prompt)} tokens"
    report = PruneReport(chosen, curve, nll, origin, {layer: holders.tensors[layer] for layer in chosen.plan.layers})
    with open_model(src) as reader:
        write_plan(reader, dst, holders.records(chosen.plan), metadata_of(report), progress)
    return report


def _tokens(model: Model, text: LoadedText) -> NDArray[np.int32]:
    """The tokens of the text; several texts follow one another, with equal shares as far as they are long."""
    if len(text.parts) == 1 and all(isinstance(piece, str) for piece in text.parts[0]):
        return model.tokenize(text.whole)
    found = [tokens_of(model, part)[0] for part in text.parts]
    lengths = [len(tokens) for tokens in found]
    shares = fair_shares(lengths, max(len(found) * min(lengths), MAX_PIECES * CALL_TOKENS))
    return np.concatenate([tokens[:share] for tokens, share in zip(found, shares, strict=True)])


@dataclass(frozen=True)
class _Holders:
    """For each layer: the tensor that holds its record, and the direction of a learned score."""

    tensors: dict[int, str]
    directions: dict[int, pruning_record.Direction]

    def records(self, plan: Plan) -> dict[str, pruning_record.Pruning]:
        """The records of a plan, by tensor."""
        return {
            self.tensors[layer]: replace(record, direction=self.directions.get(layer))
            for layer, record in plan.records().items()
        }


def _learned(
    src: str | os.PathLike[str],
    model: Model,
    tokens: NDArray[np.int32],
    allowed: Sequence[int],
    way: PruneOptions,
    progress: Progress,
) -> _Holders:
    """Learned directions of all layers whose tensors have room for them. Raises InputError if none has."""
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


def metadata_of(report: PruneReport) -> dict[str, Any]:
    """The keys ``agq.prune.*``: a readable copy of the records in the tensors, and the curve of savings."""
    plan, curve = report.chosen.plan, report.curve
    return {
        f"{PRUNE_PREFIX}score": plan.score,
        f"{PRUNE_PREFIX}keep": plan.keep,
        f"{PRUNE_PREFIX}reach": plan.reach,
        f"{PRUNE_PREFIX}reuse": int(plan.reuse),
        PRUNE_LAYERS: np.array(plan.layers, np.int32),
        f"{PRUNE_PREFIX}thresholds": np.array([value for _, value in plan.thresholds], np.float32),
        f"{PRUNE_PREFIX}saving": report.chosen.saving,
        f"{PRUNE_PREFIX}calibration": report.origin,
        f"{PRUNE_PREFIX}nll": report.nll,
        f"{PRUNE_PREFIX}curve.saving": np.array([p.saving for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.kl": np.array([p.kl for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.nll": np.array([p.nll for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.echo_kl": np.array([p.echo_kl for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.thresholds": np.array([v for p in curve for _, v in p.plan.thresholds], np.float32),
    }
