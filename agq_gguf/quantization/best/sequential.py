"""Quantizes a model stage by stage, each with the inputs that the already quantized stages really produce.

Two streams of the calibration text run through the graph side by side: x in the float model, and x^ in the model whose
earlier stages are quantized, with rounded activations. A matrix W should give W x when its input is x^. The best linear
solution is W + W T with T = E[(x - x^) x^^T] E[x^ x^^T]^-1: it compensates for the predictable part of the earlier
errors. It is rounded with error feedback on E[x^ x^^T]. (arXiv 2504.09629 has the same correction.) Products are
computed once per stream, so this needs two passes through the model, and as many Hessians as without the correction.

With experts, the float stream chooses which ones a token uses, and x^ follows: else there would be no x to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from agq_gguf.calibration.accumulate import own_share
from agq_gguf.calibration.sampling import spread
from agq_gguf.calibration.stats import InputStats
from agq_gguf.format.blocks import listable
from agq_gguf.graphs.levelled import Pair
from agq_gguf.graphs.parts import (
    Group,
    Plan,
    Stage,
    first_state,
    groups,
    multiplied,
    next_state,
    norm_before,
    read_between,
)
from agq_gguf.graphs.run import Executor, Reading, State
from agq_gguf.matrix import equalize, stock_types, typed
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.parallel import in_parallel
from agq_gguf.matrix.simulate import BlockRounder, Rounder, restored
from agq_gguf.matrix.stock_feedback import QuantizedStock
from agq_gguf.matrix.typed import Prepared, Quantized
from agq_gguf.quantization.best.fisher import Sensitivity
from agq_gguf.quantization.resume import Journal

Matrices = list[Quantized]  # one, or one for each expert
Finish = Callable[[str, Matrices], None]  # called with a name and what was made of it

_SAMPLE_ROWS = 256
_RIDGE = 0.03  # added to the Hessian in T, as a share of its mean diagonal
# T is learned from the calibration text. Half of it measured as well as all of it, and errs less on other text.
_TAKEN_BACK = 0.5
# What error feedback costs for a weight, in multiplications of a matrix product, and how much more for each column;
# between columns, and also between rows. Measured with matrices of 576 to 4864 rows and columns.
_BY_COLUMNS, _BY_ROWS = (20_000, 10), (90_000, 23)
_GRAM_COPIES = 3  # of G, while a matrix is quantized
_PREPARED = 10  # the same for an input of K columns, in K^3


@dataclass(frozen=True)
class _Sums:
    """Of some rows of x and x^: how many, E[x^ x^^T] and E[(x - x^) x^^T], both weighted."""

    rows: int
    hessian: torch.Tensor
    cross: torch.Tensor

    def mixed(self, whole: _Sums) -> _Sums:
        """With the whole input; the fewer rows, the more of it."""
        share = own_share(self.rows)
        hessian, cross = (
            a * share + b * (1 - share) for a, b in ((self.hessian, whole.hessian), (self.cross, whole.cross))
        )
        return _Sums(self.rows, hessian, cross)

    def correction(self) -> torch.Tensor:
        """T [K, K], as much of it as is taken."""
        damped = self.hessian.clone()
        damped.diagonal().add_(_RIDGE * float(self.hessian.diagonal().mean()) + torch.finfo(torch.float32).tiny)
        return torch.linalg.solve(damped, self.cross.T).T * _TAKEN_BACK


class Sequential:
    """One run over a model.

    `plan` has the weights to quantize, `types` the type of each; `batches` hold tokens [batch, n] int64. `stored` are
    the other tensors of the quantized model that differ, `pairs` matrices between which channels may be scaled, and
    `movable` says of which tensors factors can be moved. `room` bytes may be used to quantize several matrices at one
    time.
    """

    def __init__(
        self,
        run: Executor,
        plan: Plan,
        types: Mapping[str, str],
        batches: list[torch.Tensor],
        sensitivity: Sensitivity,
        options: MatrixOptions,
        *,
        stored: Mapping[str, torch.Tensor] | None = None,
        pairs: Sequence[Pair] = (),
        movable: Callable[[Sequence[str]], bool] = lambda names: True,
        room: int = 0,
    ) -> None:
        self._run, self._plan, self._types = run, plan, types
        self._sensitivity, self._options = sensitivity, options
        self._stored, self._movable, self._room = stored or {}, movable, room
        self._pairs = {pair.front: pair for pair in pairs} if options.equalize else {}
        self._levelled: dict[str, torch.Tensor] = {}  # weights to use in place of the file's, until they are quantized
        self._row_factors: dict[str, torch.Tensor] = {}  # factors by which rows of weights were multiplied
        self._norms: dict[str, torch.Tensor] = {}  # equalized
        self._keys = {group.key for stage in plan.stages for group in groups(run.graph, stage)}
        self._n_tokens = sum(tokens.numel() for tokens in batches)
        with torch.no_grad():
            self._float = [first_state(run, plan, tokens) for tokens in batches]
            with run.replacing(self._stored):
                self._rounded = [first_state(run, plan, tokens) for tokens in batches]
        # The tables are most of a small model, and only the beginning and the end read them.
        between = read_between(run.graph, plan)
        self._stored = {name: weight for name, weight in self._stored.items() if name in between}

    @torch.no_grad()
    def run(
        self, journal: Journal, progress: Callable[[int, int, str], None], finish: Finish
    ) -> dict[str, torch.Tensor]:
        """Quantizes every weight of the plan in the order of the graph; returns the norms that changed.

        Calls `finish` with what was made of each weight, and `progress` with the work done, all work and a name.
        `journal` holds the matrices of an earlier run and receives new ones.
        """
        work = [self._work(stage) for stage in self._plan.stages]
        for number, stage in enumerate(self._plan.stages):
            progress(sum(work[:number]), sum(work), stage.weights[0])
            self._stage(number, stage, journal, finish)
        progress(sum(work), sum(work), "")
        self._float, self._rounded = [], []  # large, and not needed any more
        return self._norms

    def _work(self, stage: Stage) -> int:
        """What a stage costs, in multiplications of a matrix product: the time left can be told from it."""
        nodes, work = self._run.graph.nodes, 0
        side_by_side = [0]  # work that only several matrices divide among threads
        for use in stage.uses:
            inputs = nodes[use.node].inputs
            experts, rows, columns = nodes[inputs[0]].shape[1:]
            seen = self._n_tokens * (nodes[inputs[2]].shape[-1] if use.has_experts else 1)
            of_rows = use.weight in self._sensitivity.grams
            once, by_column = _BY_ROWS if of_rows else _BY_COLUMNS
            feedback = experts * rows * columns * (once + by_column * columns)
            if of_rows:
                side_by_side.append(feedback)
            else:
                work += feedback
            work += 2 * seen * rows * columns  # two streams
            if use.weight in self._keys:
                work += 2 * seen * columns**2 + experts * _PREPARED * columns**3
        return work + max(max(side_by_side), sum(side_by_side) // torch.get_num_threads())

    # levelling

    def _weight(self, name: str) -> torch.Tensor:
        return self._levelled[name] if name in self._levelled else self._run.weight(name)

    def _level(self, stage: Stage) -> None:
        """Levels the weights of a stage: columns of the matrices behind them get the same size.

        A channel between two matrices of a pair may be multiplied by any factor if the columns of the second are
        divided by it. Each row has its own scales, but a group of columns shares one, so columns of equal size lose
        less in rounding.
        """
        for name in stage.weights:
            pair = self._pairs.get(name)
            if pair is None:
                continue
            rows, columns = self._weight(name), self._weight(pair.behind)
            square = torch.zeros(rows.shape[-2], device=rows.device)
            square.index_add_(0, pair.source, columns.square().flatten(0, -2).mean(0))
            factors = equalize.level(square)
            self._levelled |= {name: rows * factors[:, None], pair.behind: columns / factors[pair.source]}
            self._row_factors[name] = factors

    def _take_gram(self, name: str) -> torch.Tensor | None:
        """G of a matrix, adapted if its rows were levelled. It is large and needed once, so it is removed here."""
        gram, factors = self._sensitivity.grams.pop(name, None), self._row_factors.get(name)
        if gram is None or factors is None:
            return gram
        gram = gram.to(factors.device)
        return gram / factors / factors[:, None]

    # a stage

    def _stage(self, number: int, stage: Stage, journal: Journal, finish: Finish) -> None:
        self._level(stage)
        weights = {name: self._weight(name) for name in stage.weights}
        norm = norm_before(self._run.graph, stage)
        if self._options.equalize and norm and self._movable(norm):
            factors = self._factors([state[stage.given] for state in self._rounded], weights)
            if factors is not None:
                self._norms |= {name: self._run.weight(name) / factors for name in norm}
                weights = {name: weight * factors for name, weight in weights.items()}
                for state in (*self._float, *self._rounded):
                    state[stage.given] = state[stage.given] / factors
        exact = [state[stage.given] for state in self._float]
        chosen: dict[str, list[torch.Tensor]] = {}  # experts of each row, by weight
        choices: list[State] = [{} for _ in self._float]

        def multiply(place: Reading) -> torch.Tensor:
            if place.ids is not None:
                chosen.setdefault(place.weight, []).append(place.ids)
            return place.of(weights[place.weight])

        self._run.release()  # each weight is needed in its stage only
        self._advance(self._float, number, multiply, choices)
        inputs = [state[stage.given] for state in self._rounded]
        done: dict[str, Matrices] = {}
        for group in groups(self._run.graph, stage):
            ids = chosen[group.key] if group.has_experts else None
            done |= self._group(group, weights, exact, inputs, ids, journal)
        del exact, inputs  # the stream moves on batch by batch, and what it leaves is released
        applied = {name: Applied(matrices, self._run.device) for name, matrices in done.items()}
        with self._run.replacing(self._stored):
            self._advance(self._rounded, number, lambda place: place.by(applied[place.weight]), choices)
        for name, matrices in done.items():
            self._levelled.pop(name, None)
            finish(name, matrices)

    def _advance(
        self, states: list[State], number: int, product: Callable[[Reading], torch.Tensor], choices: list[State]
    ) -> None:
        """Moves a stream to the next stage, batch by batch; at the last stage nothing behind it is computed."""
        last = number + 1 == len(self._plan.stages)
        for i, state in enumerate(states):
            values = multiplied(self._run, self._plan.stages[number], state, product, choices[i])
            if not last:
                states[i] = next_state(self._run, self._plan, number + 1, values, choices[i])

    def _group(
        self,
        group: Group,
        weights: Mapping[str, torch.Tensor],
        exact: list[torch.Tensor],
        inputs: list[torch.Tensor],
        ids: list[torch.Tensor] | None,
        journal: Journal,
    ) -> dict[str, Matrices]:
        """Quantizes weights that get the same rows of the input, expert by expert."""
        experts = weights[group.key].shape[0] if group.has_experts else 1
        done: dict[str, Matrices] = {name: [] for name in group.weights}
        kept = {
            (name, expert): journal.get_matrix(self._key(name, expert, group))
            for name in group.weights
            for expert in range(experts)
        }
        missing = {expert for (_, expert), found in kept.items() if found is None}
        row_weights = self._sensitivity.weights(group.weights)
        whole = self._sums(exact, inputs, ids, None, row_weights) if missing else None
        seen = _seen(inputs) if missing else None
        for expert in range(experts):
            if expert in missing:
                assert whole is not None and seen is not None
                sums = whole
                if ids is not None:
                    sums = self._sums(exact, inputs, ids, expert, row_weights).mixed(whole)
                hessian = sums.hessian.cpu().numpy()
                square = hessian.diagonal().copy()
                correction = sums.correction()
                stats = InputStats(sums.rows, square, *seen, hessian)
                capacity = min(listable(*weights[name].shape[-2:]) for name in group.weights)
                left = [name for name in group.weights if kept[name, expert] is None]
                types = typed.in_order([self._types[name] for name in left])
                for type_name in types:
                    targets = {
                        name: weights[name][expert] if group.has_experts else weights[name]
                        for name in left
                        if self._types[name] == type_name
                    }
                    consume = type_name == types[-1]
                    made = self._of_type(type_name, targets, stats, correction, capacity, consume=consume)
                    for name, matrix in made.items():
                        journal.put_matrix(self._key(name, expert, group), matrix)
                        kept[name, expert] = matrix
            for name in group.weights:
                found = kept[name, expert]
                assert found is not None
                done[name].append(found)
        return done

    def _of_type(
        self,
        type_name: str,
        targets: Mapping[str, torch.Tensor],
        stats: InputStats,
        correction: torch.Tensor,
        capacity: int,
        *,
        consume: bool,
    ) -> dict[str, Quantized]:
        """Quantizes weights of one type with one input. What is prepared for them is released at the end."""
        prepared = typed.prepare(type_name, stats, stats.columns, capacity, self._options, consume=consume)
        jobs = [_Job(name, target, correction, prepared, self._take_gram(name)) for name, target in targets.items()]
        made: dict[str, Quantized] = {}
        for part in _together(jobs, self._room):
            found = in_parallel(partial(_quantized, options=self._options), part)
            made.update(zip([job.name for job in part], found, strict=True))
        return made

    def _key(self, name: str, expert: int, group: Group) -> str:
        return f"refined {name} as {self._types[name]}" + (f" {expert}" if group.has_experts else "")

    def _factors(self, inputs: list[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The factors that equalization moves from the norm into the matrices; None if it does not help."""
        columns, options = inputs[0].shape[-1], self._options
        rows = sum(x.numel() for x in inputs) // columns
        square = torch.stack([x.flatten(0, -2).square().sum(0) for x in inputs]).sum(0) / rows
        stats = InputStats(rows, square.cpu().numpy(), None, _sample(inputs).cpu().numpy())
        capacity = min(listable(*weight.shape[-2:]) for weight in weights.values())
        flat = [(self._types[name], weight.flatten(0, -2).cpu().numpy()) for name, weight in weights.items()]
        found = equalize.choose(
            stats, flat, capacity, options.activation_bits, options.activation_scale, options.refine
        )
        return None if found is None else torch.from_numpy(found).to(self._run.device)

    def _sums(
        self,
        exact: list[torch.Tensor],
        inputs: list[torch.Tensor],
        ids: list[torch.Tensor] | None,
        expert: int | None,
        row_weights: torch.Tensor | None,
    ) -> _Sums:
        """Sums over all rows of the input, or over those of one expert."""
        columns = inputs[0].shape[-1]
        hessian, cross = (torch.zeros(columns, columns, device=self._run.device) for _ in range(2))
        count = 0
        for x, rounded, weight in _rows(exact, inputs, ids, expert, row_weights):
            weighted = rounded if weight is None else rounded * weight[:, None]
            hessian.addmm_(weighted.T, rounded)
            cross.addmm_((x - rounded).T, weighted)
            count += len(rounded)
        return _Sums(count, hessian / max(count, 1), cross / max(count, 1))


@dataclass(frozen=True)
class _Job:
    """A matrix to quantize."""

    name: str
    weight: torch.Tensor
    correction: torch.Tensor  # T
    prepared: Prepared
    gram: torch.Tensor | None


def _quantized(job: _Job, options: MatrixOptions) -> Quantized:
    target = job.weight + job.weight @ job.correction
    gram = None if job.gram is None else job.gram.cpu()
    return typed.quantize(target.cpu().numpy(), job.prepared, options, job.name, gram)


def _together(jobs: list[_Job], room: int) -> list[list[_Job]]:
    """The jobs in parts that run at one time.

    Error feedback between rows goes from row to row, so only several matrices can occupy several threads. What they
    need for it must fit into `room` bytes. Without it each matrix uses all threads.
    """
    parts: list[list[_Job]] = []
    left = 0
    for job in jobs:
        needed = 0 if job.gram is None else _GRAM_COPIES * job.gram.nbytes
        if not parts or needed == 0 or needed > left:
            parts.append([])
            left = room if needed else 0
        parts[-1].append(job)
        left -= needed
    return parts


def _rows(
    exact: list[torch.Tensor],
    inputs: list[torch.Tensor],
    ids: list[torch.Tensor] | None,
    expert: int | None,
    row_weights: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """x, x^ [n, K] and the weights of their rows [n], batch by batch."""
    begin = 0
    for number, pair in enumerate(zip(exact, inputs, strict=True)):
        x, rounded = (part.flatten(0, -2) for part in pair)
        count = len(x) if ids is None else ids[number].numel()
        weight = None if row_weights is None else row_weights[begin : begin + count].to(x.device)
        begin += count
        if ids is not None:
            chosen = ids[number].flatten()
            slots = torch.arange(count, device=x.device) if expert is None else (chosen == expert).nonzero()[:, 0]
            rows = slots * len(x) // count  # all experts of a token may read one row
            x, rounded, weight = x[rows], rounded[rows], None if weight is None else weight[slots]
        yield x, rounded, weight


def _seen(inputs: list[torch.Tensor]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of x^, the largest value of each channel [K] and some rows [n, K]."""
    largest = torch.stack([x.flatten(0, -2).abs().amax(0) for x in inputs]).amax(0)
    return largest.cpu().numpy(), _sample(inputs).cpu().numpy()


def _sample(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Some rows [n, K] of inputs [batch, .., K], spread evenly over all places of a text."""
    flat = [x.flatten(0, -2) for x in inputs]
    places = torch.from_numpy(spread(_SAMPLE_ROWS, sum(map(len, flat)))).to(flat[0].device)
    found, begin = [], 0
    for x in flat:
        found.append(x[places[(places >= begin) & (places < begin + len(x))] - begin])
        begin += len(x)
    return torch.cat(found)


class Applied:
    """A quantized weight as the runtime applies it; experts are restored when they are needed."""

    def __init__(self, matrices: Matrices, device: str | torch.device = "cpu") -> None:
        self._matrices, self._device = matrices, device
        self._kept = applied(matrices[0], device) if len(matrices) == 1 else None

    def __call__(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """The product of rows x [.., K] with an expert's matrix; 0 without experts."""
        rounder, weight = self._kept or applied(self._matrices[expert], self._device)
        return functional.linear(rounder(x), weight)


def applied(made: Quantized, device: str | torch.device) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """How the runtime rounds inputs of a matrix, and its weights [M, K] after rounding."""
    if isinstance(made, QuantizedStock):
        return BlockRounder(stock_types.input_block(made.type_name)), torch.from_numpy(made.restored()).to(device)
    rounder = Rounder(made.matrix.parameters, made.matrix.codes.shape[1], device)
    return rounder, restored(made.matrix, rounder)
