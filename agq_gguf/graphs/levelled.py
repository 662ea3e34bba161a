"""Finds pairs of matrices between which channels may be scaled, by trying it on a few tokens.

If the rows of the first matrix are multiplied by factors, and the columns of the second are divided by them, the model
is the same function: so for a matrix and what gates it, and for values and the matrix behind attention. Nothing here
recognises such patterns. Products are replaced by ones and by the numbers of their rows. The ratio behind says which
row a column comes from, and a trial with random factors proves it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from agq_gguf.graphs.ir import Graph
from agq_gguf.graphs.run import Executor, State

_SAME = 1e-3  # relative error of the trial, at most
_SMALL = 1e-6  # a smaller response is too small to divide by


@dataclass(frozen=True)
class Pair:
    """Rows of `front` may be multiplied by factors if columns of `behind` are divided by them."""

    front: str
    behind: str
    source: torch.Tensor  # [columns of `behind`] int64: the row of `front` that each comes from


@torch.no_grad()
def levelled(run: Executor, wanted: Collection[str], tokens: torch.Tensor) -> list[Pair]:
    """All pairs among the weights in `wanted`; tries them on `tokens` [batch, n] int64.

    Each weight must have one product, and only the second matrix may read its input.
    """
    graph = run.graph
    values = run.run(run.start(tokens), 0, len(graph.nodes), keep=range(len(graph.nodes)))
    places = {i: name for i in range(len(graph.nodes)) if (name := graph.matrix_of(i)) in wanted}
    names = list(places.values())
    found = []
    for behind, name in places.items():
        if names.count(name) > 1:
            continue
        given = graph.nodes[behind].inputs[1]
        for front in _fronts(graph, given, places):
            if names.count(places[front]) == 1 and _is_alone(graph, front, given, behind):
                source = _source(run, values, front, given)
                if source is not None:
                    found.append(Pair(places[front], name, source))
    return found


def _fronts(graph: Graph, given: int, places: Collection[int]) -> list[int]:
    """The products that a value is made of, without another product between them."""
    found, todo, seen = [], [given], set()
    while todo:
        i = todo.pop()
        if i < 0 or i in seen or not graph.nodes[i].varies:
            continue
        seen.add(i)
        if i in places:
            found.append(i)
        elif not graph.matrix_of(i):
            todo.extend(graph.nodes[i].inputs)
    return sorted(found)


def _between(graph: Graph, front: int, given: int) -> list[int]:
    """The values that change with `front` and lead to `given`, in order."""
    changed = {front}
    for i in range(front + 1, given + 1):
        if changed.intersection(graph.nodes[i].inputs):
            changed.add(i)
    needed = {given}
    for i in range(given, front, -1):
        if i in needed:
            needed.update(graph.nodes[i].inputs)
    return sorted((changed & needed) - {front})


def _is_alone(graph: Graph, front: int, given: int, behind: int) -> bool:
    """Whether what changes with `front` reaches the rest of the graph through `behind` only."""
    inside = {front, *_between(graph, front, given)}
    return all(set(graph.readers[i]) <= inside | {behind} for i in inside)


def _source(run: Executor, values: State, front: int, given: int) -> torch.Tensor | None:
    """The row that each channel of `given` comes from; None if channels cannot be scaled."""
    product, between = values[front], _between(run.graph, front, given)
    rows = product.shape[-1]

    def through(value: torch.Tensor) -> torch.Tensor:
        state = {i: v for i, v in values.items() if i not in between} | {front: value}
        for i in between:
            state[i] = run.compute(i, state)
        return state[given]

    device = product.device
    ones = through(torch.ones_like(product))
    numbers = through((torch.arange(rows, device=device) + 1.0).expand_as(product).contiguous())
    ratio = torch.where(ones.abs() > _SMALL, numbers / ones, torch.nan).flatten(0, -2).nanmedian(0).values - 1
    if not torch.isfinite(ratio).all():
        return None
    source = ratio.round().long().clamp(0, rows - 1)
    factors = torch.ones(rows, device=device)
    used = source.unique()
    factors[used] = torch.rand(len(used), generator=torch.Generator().manual_seed(0)).to(device) + 0.5
    base = values[given]
    error = float((through(product * factors) - base * factors[source]).norm() / base.norm().clamp(min=1e-30))
    return source if error < _SAME else None
