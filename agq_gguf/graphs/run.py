"""Runs a translated graph in PyTorch: whole, or some of its values at a time; what a weight yields may be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from agq_gguf.graphs.ir import Graph, Node
from agq_gguf.graphs.ops import OPS
from agq_gguf.graphs.ops.products import by_expert
from agq_gguf.graphs.ops.table import Memo
from agq_gguf.graphs.unsupported import Unsupported

State = dict[int, torch.Tensor]  # values by their number in the graph, each [batch, ne3, ne2, ne1, ne0]
_OWN = ("WEIGHT", "CONST", "TOKENS", "ZEROS")  # what the executor knows itself


@dataclass(frozen=True)
class Reading:
    """One place where a weight of the file is multiplied with something that varies, or its rows are looked up."""

    node: int
    weight: str
    given: torch.Tensor | None  # [batch, .., columns]; None: a lookup
    ids: torch.Tensor | None = None  # int64: of experts [batch, 1, 1, tokens, used], or of the rows that are looked up

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """What the place yields with this weight, [rows, columns] or [experts, rows, columns]."""
        if self.given is None:
            assert self.ids is not None
            return functional.embedding(self.ids[:, 0], weight)
        if self.ids is None:
            return functional.linear(self.given, weight.reshape(-1, weight.shape[-1]))
        return self.by(lambda expert, rows: functional.linear(rows, weight[expert]))

    def by(self, product: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What the place yields if `product` multiplies rows [.., K] with an expert's matrix; 0 if there are none."""
        assert self.given is not None
        return product(0, self.given) if self.ids is None else by_expert(self.given, self.ids, product)


Replacement = Callable[[Reading], "torch.Tensor | None"]  # None: as the file has it


class Executor:
    """A graph and its weights. `read` gives a tensor of the file as float32; up to `cache` bytes of them are kept.

    All values are on `device`. Raises Unsupported if the graph has an operation that is not in the table.
    """

    def __init__(
        self, graph: Graph, read: Callable[[str], torch.Tensor], cache: int, device: str | torch.device = "cpu"
    ) -> None:
        unknown = sorted({node.op for node in graph.nodes} - set(_OWN) - set(OPS))
        if unknown:
            raise Unsupported(f"its graph has {', '.join(unknown)}, which cannot be differentiated here")
        self.graph, self._read, self._room = graph, read, cache
        self.device = torch.device(device)
        self._memo: Memo = {}
        self._cache: dict[str, torch.Tensor] = {}
        self._weights: Mapping[str, torch.Tensor] = {}  # in place of the file's
        self._replacement: Replacement | None = None
        self._constants: State = {}
        with torch.no_grad():
            for i, node in enumerate(graph.nodes):
                if node.fixed:
                    self._constants[i] = self.compute(i, self._constants)

    # weights

    def weight(self, name: str) -> torch.Tensor:
        """A tensor of the file in its shape, float32, or what replaces it."""
        if name in self._weights:
            return self._weights[name]
        if name in self._cache:
            return self._cache[name]
        found = self._read(name).to(self.device)
        if found.nbytes <= self._room:
            self._room -= found.nbytes
            self._cache[name] = found
        return found

    def release(self) -> None:
        """Forgets the tensors of the file that were kept; they are read again when they are needed."""
        self._room += sum(kept.nbytes for kept in self._cache.values())
        self._cache.clear()

    @contextmanager
    def replacing(
        self, weights: Mapping[str, torch.Tensor] | None = None, readings: Replacement | None = None
    ) -> Iterator[None]:
        """Inside the block, these tensors replace the file's, and `readings` says what places with weights yield.

        Blocks may be nested: the inner one comes first. Afterwards, and after an error, all is as it was before.
        """
        before = self._weights, self._replacement
        self._weights = {**self._weights, **(weights or {})}
        self._replacement = readings or self._replacement
        try:
            yield
        finally:
            self._weights, self._replacement = before

    # values

    def value(self, i: int, state: State) -> torch.Tensor:
        """A value that is there: in the state, a constant or a weight."""
        if i in state:
            return state[i]
        if i in self._constants:
            return self._constants[i]
        node = self.graph.nodes[i]
        if node.op != "WEIGHT":
            raise KeyError(f"value {i} ({node.op} {node.name}) is not there")
        return self.weight(node.attr).reshape(1, *node.shape)

    def reading(self, i: int, state: State) -> Reading | None:
        """The place with a weight, if the value is one; its inputs must be there."""
        graph, node = self.graph, self.graph.nodes[i]
        if name := graph.matrix_of(i):
            given = self.value(node.inputs[1], state)
            ids = self.value(node.inputs[2], state) if node.op == "MUL_MAT_ID" else None
            return Reading(i, name, given, ids)
        if name := graph.table_of(i):
            return Reading(i, name, None, self.value(node.inputs[1], state))
        return None

    def compute(self, i: int, state: State) -> torch.Tensor:
        """A value from its inputs."""
        node = self.graph.nodes[i]
        if node.op == "CONST":
            constant: torch.Tensor = node.attr
            return constant.to(self.device)
        if node.op == "ZEROS":
            return torch.zeros(1, *node.shape, device=self.device)
        if self._replacement is not None:
            place = self.reading(i, state)
            made = None if place is None else self._replacement(place)
            if made is not None:
                return made
        return self._operate(node, state)

    def _operate(self, node: Node, state: State) -> torch.Tensor:
        inputs = [None if j < 0 else self.value(j, state) for j in node.inputs]
        with self.device:  # where operations make tensors
            return OPS[node.op](node, self._memo, *inputs)

    def is_there(self, i: int, state: State) -> bool:
        """Whether a value need not be computed."""
        return i in state or i in self._constants or self.graph.nodes[i].op == "WEIGHT"

    def run(self, state: State, begin: int, end: int, keep: Iterable[int] = ()) -> State:
        """The state behind value `end` - 1, from the one before `begin`. Drops what nobody reads any more.

        What is in `keep` stays.
        """
        graph, values, kept = self.graph, dict(state), set(keep)
        for i in range(begin, end):
            if self.is_there(i, values):
                continue
            values[i] = self.compute(i, values)
            for j in graph.nodes[i].inputs:
                if j in values and j not in kept and graph.last_use[j] <= i:
                    del values[j]
        return values

    def start(self, tokens: torch.Tensor) -> State:
        """The state before the first value, for `tokens` [batch, n] int64."""
        return {
            i: tokens.to(self.device).reshape(len(tokens), *node.shape)
            for i, node in enumerate(self.graph.nodes)
            if node.op == "TOKENS"
        }

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The graph's output [batch, rows, columns] for `tokens` [batch, n] int64: logits, or embeddings."""
        values = self.run(self.start(tokens), 0, len(self.graph.nodes))
        return values[self.graph.output].flatten(1, 3)
