"""Finds where little is alive between the values of a graph: in most models one value, the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from agq_gguf.graphs.ir import Graph


@dataclass(frozen=True)
class Segment:
    """Values `begin` to `end` - 1 of a graph, and what is alive behind them."""

    begin: int
    end: int
    alive: tuple[int, ...]


def segments(graph: Graph, at_most: int = 1) -> list[Segment]:
    """Cuts a graph where `at_most` values are alive, or the fewest that are; each segment has a product.

    In a residual network that is behind each attention and behind each feed-forward.
    """
    nodes, n = graph.nodes, len(graph.nodes)
    alive: set[int] = set()
    behind: list[tuple[int, ...]] = []
    ends: dict[int, list[int]] = {}
    for i in range(n):
        if nodes[i].varies:
            ends.setdefault(graph.last_use[i], []).append(i)
            alive.add(i)
        alive -= set(ends.pop(i, ()))
        behind.append(tuple(sorted(alive)))
    products = [bool(graph.matrix_of(i)) for i in range(n)]
    if not any(products):
        return [Segment(0, n, (graph.output,))]
    first, last = products.index(True), n - 1 - products[::-1].index(True)
    fewest = max(at_most, min((len(behind[i]) for i in range(first, n) if behind[i]), default=1))
    found, begin, busy = [], 0, False
    for i in range(last):
        busy |= products[i]
        if busy and 0 < len(behind[i]) <= fewest and nodes[i].varies:
            found.append(Segment(begin, i + 1, behind[i]))
            begin, busy = i + 1, False
    found.append(Segment(begin, n, (graph.output,)))
    return found
