"""Finds the parts of a graph that quantization works on: stages, norms, and what attention reads of every token.

Nothing here knows an architecture. A stage is all products that read one value, such as q, k and v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from agq_gguf.graphs.ir import Graph
from agq_gguf.graphs.ops.indices import CHOICES
from agq_gguf.graphs.run import Executor, Reading, State

_NORMS = ("NORM", "RMS_NORM")


@dataclass(frozen=True)
class Use:
    """One product with a weight of the file."""

    node: int
    weight: str
    before: tuple[int, ...]  # values to compute first, such as which experts are used
    has_experts: bool


@dataclass(frozen=True)
class Stage:
    """Products that read one value; `alive` is the state before them."""

    given: int  # the value that they read, [batch, ne3, ne2, ne1, columns]
    lead: tuple[int, ...]  # values to compute between the stage before and this one
    uses: tuple[Use, ...]
    alive: tuple[int, ...]

    @property
    def weights(self) -> list[str]:
        """Names of the weights."""
        return [use.weight for use in self.uses]


@dataclass(frozen=True)
class Group:
    """Weights of a stage that can share statistics of its input: all rows of it, or the same rows for each expert."""

    weights: tuple[str, ...]
    has_experts: bool

    @property
    def key(self) -> str:
        """The first weight, which identifies the group."""
        return self.weights[0]


@dataclass(frozen=True)
class Plan:
    """All stages in an order in which they can run, and the values behind the last one."""

    stages: tuple[Stage, ...]
    rest: tuple[int, ...]


def products(graph: Graph) -> dict[str, int]:
    """Weights that the graph multiplies with something that varies -> how many places do so."""
    found: dict[str, int] = {}
    for i in range(len(graph.nodes)):
        if name := graph.matrix_of(i):
            found[name] = found.get(name, 0) + 1
    return found


def lookups(graph: Graph) -> set[str]:
    """Weights whose rows the graph looks up by the text."""
    return {name for i in range(len(graph.nodes)) if (name := graph.table_of(i))}


def stages(graph: Graph, wanted: Collection[str]) -> Plan:
    """The stages with the weights in `wanted`. Products with other weights are values like any other."""
    nodes = graph.nodes
    by_input: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        if graph.matrix_of(i) in wanted:
            by_input.setdefault(_source_of(graph, node.inputs[1]), []).append(i)
    product_nodes = {i for uses in by_input.values() for i in uses}
    done = {i for i, node in enumerate(nodes) if node.fixed or node.op in ("WEIGHT", "TOKENS")}

    def leading_to(target: int) -> set[int] | None:
        """Values that are needed for the target; None if a product of another stage is among them."""
        found: set[int] = set()
        todo = [target]
        while todo:
            i = todo.pop()
            if i < 0 or i in done or i in found:
                continue
            if i in product_nodes:
                return None
            found.add(i)
            todo.extend(nodes[i].inputs)
        return found

    made: list[Stage] = []
    open_groups = [(uses[0], given, uses) for given, uses in by_input.items()]
    while open_groups:
        first = min(open_groups)
        open_groups.remove(first)
        _, given, members = first
        lead = leading_to(given)
        assert lead is not None  # all products before the first of this stage are done
        done |= lead
        alive = tuple(sorted(_alive(graph, done)))
        uses, later = [], []
        for i in members:
            needs = [leading_to(j) for j in nodes[i].inputs]
            if any(need is None for need in needs):
                later.append(i)
                continue
            before = {j for need in needs if need for j in need}
            done |= before | {i}
            uses.append(Use(i, graph.matrix_of(i), tuple(sorted(before)), nodes[i].op == "MUL_MAT_ID"))
        if later:
            open_groups.append((later[0], given, later))
        made.append(Stage(given, tuple(sorted(lead)), tuple(uses), alive))
    rest = leading_to(graph.output)
    return Plan(tuple(made), tuple(sorted(rest or ())))


def groups(graph: Graph, stage: Stage) -> list[Group]:
    """The weights of a stage, by which rows of its input they get."""
    found: dict[int, list[str]] = {}
    for use in stage.uses:
        found.setdefault(graph.nodes[use.node].inputs[2] if use.has_experts else -1, []).append(use.weight)
    return [Group(tuple(weights), ids >= 0) for ids, weights in found.items()]


def _source_of(graph: Graph, i: int) -> int:
    """The value before reshapes that keep rows whole."""
    node = graph.nodes[i]
    while node.op == "RESHAPE" and graph.nodes[node.inputs[0]].shape[-1] == node.shape[-1]:
        i = node.inputs[0]
        node = graph.nodes[i]
    return i


def _alive(graph: Graph, done: set[int]) -> set[int]:
    """What the values that are not done need of those that are."""
    needed = {j for i, node in enumerate(graph.nodes) if i not in done for j in node.inputs if j in done}
    return {j for j in needed | ({graph.output} & done) if graph.nodes[j].varies}


# from stage to stage


def first_state(run: Executor, plan: Plan, tokens: torch.Tensor) -> State:
    """The state before the first stage, for `tokens` [batch, n] int64."""
    return next_state(run, plan, 0, run.start(tokens))


def read_between(graph: Graph, plan: Plan) -> set[str]:
    """Names of the weights that are read from the first stage to the last, without those of the stages."""
    later = [i for stage in plan.stages[1:] for i in stage.lead]
    within = [i for stage in plan.stages for use in stage.uses for i in use.before]
    return {graph.weight_of(j) for i in (*later, *within) for j in graph.nodes[i].inputs if j >= 0} - {""}


def multiplied(
    run: Executor,
    stage: Stage,
    state: State,
    product: Callable[[Reading], torch.Tensor],
    choices: State | None = None,
) -> State:
    """The values before a stage and those of its places; `product` says what each place yields.

    `choices` (which experts a token uses) are followed where they are known, and noted where they are not. So two
    streams that share them use the same experts.
    """
    values = dict(state)
    for use in stage.uses:
        for i in use.before:
            values[i] = _chosen(run, i, values, choices)
        place = run.reading(use.node, values)
        assert place is not None
        values[use.node] = product(place)
    return values


def next_state(run: Executor, plan: Plan, number: int, values: State, choices: State | None = None) -> State:
    """The state before stage `number`, from the values that the stage before it has left.

    Behind the last stage it is the graph's output.
    """
    last = number == len(plan.stages)
    values = dict(values)
    for i in plan.rest if last else plan.stages[number].lead:
        values[i] = _chosen(run, i, values, choices)
    alive = (run.graph.output,) if last else plan.stages[number].alive
    return {i: values[i] for i in alive if i in values}


def _chosen(run: Executor, i: int, values: State, choices: State | None) -> torch.Tensor:
    if choices is None or run.graph.nodes[i].op not in CHOICES:
        return run.compute(i, values)
    if i not in choices:
        choices[i] = run.compute(i, values)
    return choices[i]


def numbers_alive(graph: Graph, plan: Plan) -> int:
    """The most values [numbers] that a stage's state and its input hold of one text."""
    return max((sum(math.prod(graph.nodes[i].shape) for i in (*s.alive, s.given)) for s in plan.stages), default=0)


# norms and attention


def norm_before(graph: Graph, stage: Stage) -> tuple[str, ...]:
    """Weight (and bias) of the norm that makes a stage's input, if only the stage reads what they make; else nothing.

    Factors may then be moved from them into the matrices of the stage (`equalize`).
    """
    nodes, readers = graph.nodes, graph.readers

    def only(i: int, allowed: set[int]) -> bool:
        return all(k in allowed or (nodes[k].op == "RESHAPE" and only(k, allowed)) for k in readers[i])

    found: list[str] = []
    i, allowed = stage.given, {use.node for use in stage.uses}
    for op in ("ADD", "MUL"):
        node = nodes[i]
        if node.op != op:
            continue
        vector = node.inputs[1]
        if not graph.weight_of(vector) or nodes[vector].shape[:3] != (1, 1, 1) or not only(i, allowed):
            return ()
        if len(readers[vector]) > 1 or i == graph.output:
            return ()
        found.insert(0, graph.weight_of(vector))
        if op == "MUL":
            return tuple(found) if nodes[node.inputs[0]].op in _NORMS else ()
        allowed, i = {i}, node.inputs[0]
    return ()


def norms(graph: Graph) -> list[str]:
    """Weights that multiply what a norm yields, channel by channel."""
    found = [
        graph.weight_of(node.inputs[1])
        for node in graph.nodes
        if node.op == "MUL" and graph.nodes[node.inputs[0]].op in _NORMS
    ]
    return list(dict.fromkeys(name for name in found if name))


def keys_and_values(graph: Graph) -> set[str]:
    """Weights whose products attention reads of every token, as keys or values."""
    nodes = graph.nodes
    todo: list[int] = []
    for node in nodes:
        if node.op == "FLASH_ATTN_EXT":
            todo += node.inputs[1:3]
        elif node.op == "MUL_MAT" and all(nodes[i].varies for i in node.inputs):
            todo.append(node.inputs[0])
    found: set[str] = set()
    seen: set[int] = set()
    while todo:
        i = todo.pop()
        if i < 0 or i in seen or not nodes[i].varies:
            continue
        seen.add(i)
        if name := graph.matrix_of(i):
            found.add(name)
        else:
            todo.extend(nodes[i].inputs)
    return found
