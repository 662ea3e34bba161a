"""Translates a recorded graph into data flow: memory, views and writes in place are resolved.

A value is a tensor [batch, ne3, ne2, ne1, ne0]; batch is 1 for what does not depend on the tokens. ggml's tensors are
windows on memory. Each has a root, whose memory an operation (SET_ROWS into the cache, CPY, operations in place) may
change after other windows were made. Here each root has a current value. A write makes a new one, and a window is taken
of the value that is current when somebody reads it. So "store into the cache, then read the cache" becomes plain data
flow, and where the store fills the whole cache it disappears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from agq_gguf.graphs.trace import TOKENS, Raw, Trace
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.graphs.windows import SIZES, is_contiguous, strides_of, window

PRODUCTS = ("MUL_MAT", "MUL_MAT_ID")
_VIEWS = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")
_COPIES = ("CPY", "DUP", "CONT")  # of values; types do not matter here, as everything is float32


@dataclass(frozen=True)
class Node:
    """One value and how it is made."""

    op: str  # WEIGHT, CONST, TOKENS, ZEROS; WINDOW, RESHAPE, PERMUTE, FILL_ROWS, WRITE; else ggml's name
    inputs: tuple[int, ...]  # values; -1: none
    shape: tuple[int, ...]  # [ne3, ne2, ne1, ne0]
    name: str = ""  # ggml's
    raw: Raw | None = None  # with the parameters of ggml's operations
    attr: Any = None  # of our own operations; of a weight, its name in the file
    index: int = -1  # of the ggml node in the order of the graph
    varies: bool = False  # with the tokens
    fixed: bool = False  # depends neither on tokens nor on weights

    def i32(self, i: int) -> int:
        """An integer parameter of ggml's operation."""
        assert self.raw is not None
        return self.raw.i32(i)

    def f32(self, i: int) -> float:
        """A float parameter of ggml's operation."""
        assert self.raw is not None
        return self.raw.f32(i)


@dataclass
class Graph:
    """Values in an order in which each comes after its inputs; all of them lead to the output."""

    nodes: list[Node] = field(default_factory=list)
    output: int = -1

    def weight_of(self, i: int) -> str:
        """The name of the file's tensor if the value is one, else ''."""
        return str(self.nodes[i].attr) if i >= 0 and self.nodes[i].op == "WEIGHT" else ""

    def matrix_of(self, i: int) -> str:
        """The name of the weight if the value is its product with something that varies, else ''.

        The weight must be one matrix, or one for each expert; not one for each head.
        """
        node = self.nodes[i]
        if node.op not in PRODUCTS or not self.nodes[node.inputs[1]].varies:
            return ""
        n_dims = 2 if node.op == "MUL_MAT" else 3
        plain = all(size == 1 for size in self.nodes[node.inputs[0]].shape[:-n_dims])
        return self.weight_of(node.inputs[0]) if plain else ""

    def table_of(self, i: int) -> str:
        """The name of the weight if the value is a lookup of its rows by something that varies, else ''."""
        node = self.nodes[i]
        return self.weight_of(node.inputs[0]) if node.op == "GET_ROWS" and self.nodes[node.inputs[1]].varies else ""

    @cached_property
    def readers(self) -> list[list[int]]:
        """For each value, the values that are made of it."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for j in {j for j in node.inputs if j >= 0}:
                found[j].append(i)
        return found

    @cached_property
    def last_use(self) -> list[int]:
        """For each value, the last one that reads it; of the output, the number of values."""
        found = [max(readers, default=i) for i, readers in enumerate(self.readers)]
        found[self.output] = len(self.nodes)
        return found


def check_inputs(first: Trace, second: Trace) -> None:
    """Raises Unsupported where something besides the tokens differs between two texts of the same length."""

    def inputs(trace: Trace) -> list[Raw]:
        order = [a for node in trace.nodes for a in trace.tensors[node].src if a]
        return [trace.tensors[a] for a in dict.fromkeys(order) if trace.tensors[a].data is not None]

    one, two = inputs(first), inputs(second)
    shapes = [[(t.tensors[a].op, t.tensors[a].ne) for a in t.nodes] for t in (first, second)]
    if shapes[0] != shapes[1] or len(one) != len(two):
        raise Unsupported("its graph is another for another text")
    for a, b in zip(one, two, strict=True):
        assert a.data is not None and b.data is not None
        if a.name != TOKENS and a.is_input and not np.array_equal(a.data, b.data, equal_nan=a.type[0] == "f"):
            raise Unsupported(f"its graph's input {a.name} depends on the text")


def translate(trace: Trace, weights: Mapping[str, tuple[int, ...]], *, output: str = "") -> Graph:
    """The data flow of a trace; `weights` are names and shapes (numpy order) of the file's tensors.

    Its output is the node that llama.cpp calls `output`, or the last one. Raises Unsupported for memory that is neither
    in the file nor set by llama.cpp.
    """
    return _Translator(trace, weights).run(output)


class _Translator:
    def __init__(self, trace: Trace, weights: Mapping[str, tuple[int, ...]]) -> None:
        self._trace, self._weights = trace, weights
        self._nodes: list[Node] = []
        self._current: dict[int, int] = {}  # address of a root -> value, in the root's shape
        self._windows: dict[tuple[Any, ...], int] = {}
        self._written = {
            self._root(t).address for a in trace.nodes if (t := trace.tensors[a]).view_src and t.op not in _VIEWS
        }

    def run(self, output: str) -> Graph:
        """Translates every node and drops what does not lead to the output."""
        last, named = -1, -1
        for index, address in enumerate(self._trace.nodes):
            t = self._trace.tensors[address]
            if t.op not in _VIEWS and t.op != "NONE":
                last = self._node(t, index)
                named = last if output and t.name == output else named
        return _compact(self._nodes, last if named < 0 else named)

    def _add(self, op: str, inputs: tuple[int, ...], shape: tuple[int, ...], **more: Any) -> int:
        nodes, given = self._nodes, [self._nodes[i] for i in inputs if i >= 0]
        varies = op == "TOKENS" or any(node.varies for node in given)
        fixed = op not in ("TOKENS", "WEIGHT") and all(node.fixed for node in given)
        nodes.append(Node(op, inputs, shape, varies=varies, fixed=fixed, **more))
        return len(nodes) - 1

    def _root(self, t: Raw) -> Raw:
        return self._trace.tensors[t.view_src] if t.view_src else t

    def _leaf(self, t: Raw) -> int:
        shape = tuple(reversed(t.ne))
        if t.name in self._weights:
            own = self._weights[t.name]
            if (1,) * (4 - len(own)) + tuple(own) != shape:
                raise Unsupported(f"its graph's {t.name} has another shape than the file's")
            return self._add("WEIGHT", (), shape, name=t.name, attr=t.name)
        if t.name == TOKENS:
            return self._add("TOKENS", (), shape, name=t.name)
        if t.address in self._written and t.is_zero:
            return self._add("ZEROS", (), shape, name=t.name)
        if t.data is None:
            raise Unsupported(f"its graph reads {t.name!r} of type {t.type}, which is no tensor of the file")
        data = torch.from_numpy(t.data.astype(np.int64 if t.type[0] == "i" else np.float32))
        return self._add("CONST", (), shape, name=t.name, attr=data[None])

    def _root_value(self, root: Raw) -> int:
        if root.address not in self._current:
            if root.op != "NONE":
                raise Unsupported(f"its graph reads {root.name} ({root.op}) before computing it")
            self._current[root.address] = self._leaf(root)
        return self._current[root.address]

    def _value(self, t: Raw) -> int:
        """The value of a tensor as a reader sees it now."""
        root = self._root(t)
        base = self._root_value(root)
        if root is t:
            return base
        key = (base, t.ne, t.nb, t.view_offs)
        if key not in self._windows:
            self._windows[key] = self._window(t, root, base)
        return self._windows[key]

    def _window(self, t: Raw, root: Raw, base: int) -> int:
        shape = tuple(reversed(t.ne))
        if t.ne == root.ne and t.nb == root.nb and not t.view_offs:
            return base
        source = self._trace.tensors[t.src[0]] if t.src[0] else root
        if t.op in ("PERMUTE", "TRANSPOSE"):
            to = [t.i32(i) for i in range(4)] if t.op == "PERMUTE" else [1, 0, 2, 3]
            axes = [0] * 4  # ggml: dimension i of the source becomes dimension to[i]
            for i, j in enumerate(to):
                axes[3 - j] = 3 - i
            return self._add("PERMUTE", (self._value(source),), shape, name=t.name, attr=tuple(axes))
        if t.op == "RESHAPE" or (math.prod(t.ne) == math.prod(root.ne) and is_contiguous(t) and is_contiguous(root)):
            given = self._value(source) if t.op == "RESHAPE" else base
            return self._add("RESHAPE", (given,), shape, name=t.name)
        weight = bool(self._weights.get(root.name)) and root.op == "NONE"
        if not weight and (root.type not in SIZES or not is_contiguous(root) or t.type != root.type):
            raise Unsupported(f"its graph looks at a part of {root.name} of type {root.type}, or in another type")
        return self._add("WINDOW", (base,), shape, name=t.name, attr=window(t, root, self._size(root)))

    def _size(self, root: Raw) -> int:
        """Bytes of a value of a root; of weights, from the bytes of a row."""
        if root.type in SIZES:
            return SIZES[root.type]
        size = root.nb[1] // root.ne[0] if root.nb[1] % root.ne[0] == 0 else 0
        if size not in (2, 4):
            raise Unsupported(f"its graph looks at a part of {root.name}, which is quantized")
        return size

    def _node(self, t: Raw, index: int) -> int:
        shape = tuple(reversed(t.ne))
        sources = t.src[:1] if t.op in _COPIES else t.src  # src[1] of a cast is the tensor itself
        inputs = tuple(self._value(self._trace.tensors[a]) if a else -1 for a in sources)
        while inputs and inputs[-1] == -1:
            inputs = inputs[:-1]
        if t.op == "SET_ROWS":
            made = self._set_rows(t, inputs, shape)
        elif t.op in _COPIES:
            same = self._nodes[inputs[0]].shape == shape
            made = inputs[0] if same else self._add("RESHAPE", inputs, shape, name=t.name)
        elif t.op == "GET_ROWS" and self._takes_all_rows(inputs, shape):
            made = inputs[0]  # the rows whose outputs are wanted: all of them
        else:
            made = self._add(t.op, inputs, shape, name=t.name, raw=t, index=index)
        root = self._root(t)
        if root is t:
            self._current[t.address] = made
            return made
        whole = math.prod(t.ne) == math.prod(root.ne) and not t.view_offs and is_contiguous(t)
        target = tuple(reversed(root.ne))
        if whole:
            new = made if t.ne == root.ne else self._add("RESHAPE", (made,), target, name=root.name)
        else:
            size = self._size(root)
            place = strides_of(t, size), t.view_offs // size
            new = self._add("WRITE", (self._root_value(root), made), target, name=root.name, attr=place)
        self._current[root.address] = new
        self._windows[new, t.ne, t.nb, t.view_offs] = made
        return made

    def _set_rows(self, t: Raw, inputs: tuple[int, ...], shape: tuple[int, ...]) -> int:
        """Rows 0 to n - 1 of an empty cache are its rows, and zeros behind them if the cache is longer."""
        rows, places, base = inputs
        index, given = self._nodes[places], self._nodes[rows]
        if index.op == "CONST" and self._is_zero(base) and given.shape[:2] == shape[:2]:
            flat = index.attr.flatten()
            n = given.shape[2]
            if len(flat) == n and bool((flat == torch.arange(n)).all()):
                return rows if n == shape[2] else self._add("FILL_ROWS", (rows,), shape, name=t.name)
        return self._add("SET_ROWS", (base, rows, places), shape, name=t.name, raw=t)

    def _takes_all_rows(self, inputs: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        rows, index = (self._nodes[i] for i in inputs)
        if index.op != "CONST" or rows.shape != shape or rows.op == "WEIGHT":
            return False
        flat = index.attr.flatten()
        return len(flat) == shape[2] and bool((flat == torch.arange(len(flat))).all())

    def _is_zero(self, value: int) -> bool:
        node = self._nodes[value]
        return node.op == "ZEROS" or (node.op in ("RESHAPE", "WINDOW", "PERMUTE") and self._is_zero(node.inputs[0]))


def _compact(nodes: list[Node], output: int) -> Graph:
    """The graph of what leads to the output."""
    needed = [False] * len(nodes)
    needed[output] = True
    for i in range(len(nodes) - 1, -1, -1):
        if needed[i]:
            for j in nodes[i].inputs:
                needed[j] |= j >= 0
    place: dict[int, int] = {-1: -1}
    graph = Graph()
    for i, node in enumerate(nodes):
        if needed[i]:
            place[i] = len(graph.nodes)
            graph.nodes.append(replace(node, inputs=tuple(place[j] for j in node.inputs)))
    graph.output = place[output]
    return graph
