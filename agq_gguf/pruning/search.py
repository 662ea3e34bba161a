"""Chooses pruning layers and thresholds by trial runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from agq_gguf.errors import InputError
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import (
    Plan,
    Work,
    droppable,
    overlooked,
    single_layers,
    split_saving,
    threshold_for,
)
from agq_gguf.pruning.trial import Run, Runner

_BETTER = 0.97  # another pruning layer must lower the divergence to this share of it
_ENOUGH = 0.95  # share of the wanted saving that a choice must reach


@dataclass(frozen=True)
class Point:
    """A plan with what it was measured to save and to cost."""

    plan: Plan
    saving: float  # share of the work of the prompts
    kl: float  # of the tokens that follow, from the unpruned model, mean, in nats
    nll: float  # of the tokens that follow, mean, in nats
    echo_kl: float  # the same KL where the text repeats a part of the prompt


def plan_for(
    run: Runner, work: Work, layers: Sequence[int], saving: float, base: Run, choice: PruneOptions
) -> tuple[Plan, Run]:
    """Thresholds for these layers that save the share `saving` of the work, and the run with them.

    Each layer contributes the same saving. If a layer has too few tokens left to drop, the plan saves less.
    """
    tokens = sum(map(len, next(iter(base.importance.values()))))
    shares = split_saving(work, layers, [1.0] * len(layers), saving)
    plan, seen = choice.plan(), base
    for i, (layer, share) in enumerate(zip(layers, shares, strict=True)):
        threshold = threshold_for(seen.importance[layer], round(share * tokens))
        plan = choice.plan(*plan.thresholds, (layer, threshold))
        seen = run(plan, layers[i + 1 : i + 2])
    return plan, seen


def choose_layers(run: Runner, work: Work, allowed: Sequence[int], base: Run, choice: PruneOptions) -> tuple[int, ...]:
    """The layers at which the wanted saving costs least: the best single layer, then further layers that improve it."""
    tokens = sum(map(len, base.importance[allowed[0]]))
    most = droppable(base.importance[allowed[0]]) / tokens

    def tried(saving: float) -> list[int]:
        def missed(layer: int) -> float:
            return overlooked(base.importance, layer, round(saving / work.worth(layer) * tokens))

        return single_layers(work, saving, allowed, most, choice.candidates, missed)

    candidates = tried(choice.saved)
    if not candidates:
        raise InputError(
            f"cannot save {choice.saved:.0%} of the work: at most {most:.0%} of the tokens of a calibration prompt can "
            f"be dropped, after layer {allowed[0]} at the earliest; choose a smaller share, or keep fewer of the last "
            "tokens"
        )
    later = tried(choice.saved / 2)
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for size in range(1, choice.max_layers + 1):
        extensions = [(layer,) for layer in candidates] if size == 1 else _extend(best[1], {*candidates, *later})
        runs = [(plan_for(run, work, layers, choice.saved, base, choice)[1], layers) for layers in extensions]
        # With equal parts, several layers may save less than one of them could alone.
        found = [(seen.cost, layers) for seen, layers in runs if work.saving(seen.left) > _ENOUGH * choice.saved]
        if not found or min(found)[0] > _BETTER * best[0]:
            break
        best = min(found)
    if not best[1]:
        raise InputError(f"cannot save {choice.saved:.0%} of the work at any layer; choose a smaller share")
    return best[1]


def _extend(layers: tuple[int, ...], more: Iterable[int]) -> list[tuple[int, ...]]:
    return [tuple(sorted((*layers, layer))) for layer in sorted(set(more) - set(layers))]


def choose(run: Runner, work: Work, allowed: Sequence[int], choice: PruneOptions) -> tuple[Point, list[Point], float]:
    """The plan for the wanted share, the curve of savings with its layers, and the unpruned NLL."""
    base = run(choice.plan(), allowed)
    layers = choice.layers or choose_layers(run, work, allowed, base, choice)
    chosen = None
    points: list[Point] = []
    for saving in sorted({*choice.curve, choice.saved}):
        plan, found = plan_for(run, work, layers, saving, base, choice)
        point = Point(plan, work.saving(found.left), found.kl, found.nll, found.echo_kl)
        if saving == choice.saved:
            chosen = point
        if not points or point.saving > points[-1].saving + 0.01:  # beyond the maximum saving the points repeat
            points.append(point)
    assert chosen is not None
    return chosen, points, base.nll
