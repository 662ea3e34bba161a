"""Finds the layers of a graph in which attention is computed in parts: where it stands, and the states around it."""

from __future__ import annotations

from dataclasses import dataclass

from agq_gguf.gguf_io.tensor_names import layer_of
from agq_gguf.graphs.ir import Graph
from agq_gguf.graphs.segments import segments


@dataclass(frozen=True)
class Layer:
    """Nodes of ggml's graph, by their place in its order, that hold what a layer computes."""

    before: int | None  # the state that the layer begins with [tokens, channels]; None for the embedding
    attention: int  # how much each token attends to each other one [heads, tokens, tokens]
    after_attention: int  # the state behind the attention [tokens, channels]


def layers(graph: Graph) -> dict[int, Layer]:
    """The layers with attention, by their number in the names of their weights.

    A layer is left out if no single value is alive behind its attention, as where the feed-forward runs beside it.
    """
    cuts = [part for part in segments(graph)[:-1] if len(part.alive) == 1]
    attentions = [
        (i, layer)
        for i, node in enumerate(graph.nodes)
        if node.op == "SOFT_MAX" and len(node.inputs) > 1 and node.varies and (layer := _layer(graph, i)) is not None
    ]
    if not attentions:  # a recurrent model
        return {}
    ends = [i for i, _ in attentions[1:]] + [len(graph.nodes)]
    found = {}
    for (i, layer), end in zip(attentions, ends, strict=True):
        before = [cut for cut in cuts if cut.end <= i]
        behind = [cut for cut in cuts if i < cut.end <= end]
        if len(behind) > 1:
            start = _place(graph, before[-1].alive[0]) if before else None
            found[layer] = Layer(start, graph.nodes[i].index, _place(graph, behind[0].alive[0]))
    return found


def _layer(graph: Graph, i: int) -> int | None:
    """The layer of the products that a value is made of."""
    todo, seen = [i], set()
    while todo:
        i = todo.pop()
        if i < 0 or i in seen or not graph.nodes[i].varies:
            continue
        seen.add(i)
        if name := graph.matrix_of(i):
            return layer_of(name)
        todo.extend(graph.nodes[i].inputs)
    return None


def _place(graph: Graph, i: int) -> int:
    """The ggml node that holds a value, perhaps in another shape."""
    while graph.nodes[i].index < 0 and graph.nodes[i].op == "RESHAPE":
        i = graph.nodes[i].inputs[0]
    return graph.nodes[i].index
