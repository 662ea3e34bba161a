"""Chooses which tensors get more bits within a budget. Pure: plans and costs in, plans out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite

from agq_gguf.errors import InputError
from agq_gguf.format.blocks import TYPE_NAME
from agq_gguf.gguf_io.reader import TYPE_IDS, TYPES
from agq_gguf.gguf_io.writer import layout
from agq_gguf.quantization.options import LARGER_TYPES
from agq_gguf.quantization.type_plan import TensorPlan

LADDER = (TYPE_NAME, *LARGER_TYPES)
REASON = "sensitive"
_LARGE = 20  # a step of more than 1 / 20 of the budget is large


def open_types(
    plans: Iterable[TensorPlan], may_choose: Mapping[str, bool], allowed: Collection[str] = LARGER_TYPES
) -> dict[str, tuple[str, ...]]:
    """Types that the budget may choose from, for all tensors that can be AGQ4.

    `may_choose` says whether the budget may choose the type of the output matrix and of the token embedding, `allowed`
    which types beside AGQ4 it may give.
    """
    return {
        plan.source.name: _fitting(plan.source.shape[-1], allowed)
        for plan in plans
        if plan.type_name == TYPE_NAME and may_choose.get(plan.source.name, True)
    }


def _fitting(columns: int, allowed: Collection[str]) -> tuple[str, ...]:
    """Types for so many columns, each of another size."""
    fit = [t for t in LADDER if t in (TYPE_NAME, *allowed) and columns % TYPES[TYPE_IDS[t]][1] == 0]
    return tuple(t for t in fit if t != "q5_0" or "q5_K" not in fit)


def bits_per_weight(plans: Iterable[TensorPlan]) -> float:
    """Bits per weight over all tensors, as `quantize` reports them."""
    placed = layout((plan.source.name, plan.type_name, plan.source.shape) for plan in plans)
    return 8 * sum(t.n_bytes for t in placed) / sum(t.n_elements for t in placed)


@dataclass(frozen=True)
class _Step:
    """A larger type for a tensor, after `order` smaller steps of the same tensor."""

    name: str
    order: int
    type_name: str
    n_bytes: int
    gain: float  # the cost that it saves


def choose(plans: list[TensorPlan], damage: Mapping[str, Mapping[str, float]], target: float) -> list[TensorPlan]:
    """Plans of at most `target` bits per weight with a low sum of `damage` (tensor -> type -> cost).

    `plans` have the smallest types; tensors without an entry in `damage` keep them. Takes the step that saves most per
    byte first, until none fits. A large step that did not fit, most often a table's, is also tried as the first one.
    Raises InputError if the smallest plans exceed the target.
    """
    least = bits_per_weight(plans)
    if least > target + 1e-9:
        raise InputError(f"the target must be at least {least:.3f} bits per weight for this model, got {target:g}")
    room = (target - least) * sum(plan.source.n_elements for plan in plans) / 8
    steps: list[_Step] = []
    for plan in plans:
        costs = damage.get(plan.source.name, {})
        sizes = {t: layout([(plan.source.name, t, plan.source.shape)])[0].n_bytes for t in costs}
        # A type that cannot hold a tensor's values costs no number.
        hull = _hull([(sizes[t], costs[t], t) for t in LADDER if t in costs and isfinite(costs[t])])
        for order, (low, high) in enumerate(pairwise(hull)):
            steps.append(_Step(plan.source.name, order, high[2], high[0] - low[0], low[1] - high[1]))
    steps.sort(key=lambda step: (-step.gain / step.n_bytes, step.name, step.order))
    taken = _take(steps, room)
    done = set(taken)
    large = [step for step in steps if step not in done and room / _LARGE < step.n_bytes <= room]
    found = [taken, *(_take([*_up_to(step, steps), *steps], room) for step in large)]
    chosen = {step.name: step.type_name for step in max(found, key=lambda taken: sum(step.gain for step in taken))}
    return [
        replace(plan, type_name=chosen[plan.source.name], reason=REASON) if plan.source.name in chosen else plan
        for plan in plans
    ]


def _take(steps: Iterable[_Step], room: float) -> list[_Step]:
    """The steps that fit into `room` bytes, in the order in which they are tried."""
    taken: list[_Step] = []
    reached: Counter[str] = Counter()
    for step in steps:
        if step.order == reached[step.name] and step.n_bytes <= room:
            room -= step.n_bytes
            reached[step.name] += 1
            taken.append(step)
    return taken


def _up_to(last: _Step, steps: Iterable[_Step]) -> list[_Step]:
    """A step with those of the same tensor that come before it."""
    return sorted((s for s in steps if s.name == last.name and s.order <= last.order), key=lambda s: s.order)


def _hull(points: list[tuple[int, float, str]]) -> list[tuple[int, float, str]]:
    """The lower convex hull of `points` (bytes, cost, type), as far as the cost falls; bytes must be ascending."""
    hull: list[tuple[int, float, str]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, str], b: tuple[int, float, str]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
