"""Runs the quality `best`, for models whose graph runs in PyTorch (`graphs`).

It has three steps, each in its own module: `fisher` weighs the tokens, `sequential` quantizes stage by stage, `tune`
trains norms and scales. This module gives them their text, their memory and each other's results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.arguments import Progress
from agq_gguf.calibration.session import Session
from agq_gguf.calibration.stats import InputStats
from agq_gguf.gguf_io.reader import FLOATS, Reader
from agq_gguf.gguf_io.tensor_names import EMBEDDING, OUTPUT
from agq_gguf.graphs import parts
from agq_gguf.graphs.batches import batches_of
from agq_gguf.graphs.levelled import Pair, levelled
from agq_gguf.graphs.run import Executor
from agq_gguf.graphs.support import graph_for, open_graph
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.matrix import stock_types, typed
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.typed import SEARCHED, Quantized
from agq_gguf.quantization.best import memory as shares
from agq_gguf.quantization.best import tune
from agq_gguf.quantization.best.fisher import Sensitivity, affordable, measure
from agq_gguf.quantization.best.sequential import Finish, Matrices, Sequential, applied
from agq_gguf.quantization.resume import Journal
from agq_gguf.quantization.type_plan import TensorPlan

_TUNE_TOKENS = 512  # per training step
_EPOCHS = 2
_TRIED_TOKENS = 8  # on which pairs of matrices are tried


@dataclass(frozen=True)
class Setting:
    """Options and resources of a run."""

    options: MatrixOptions
    memory: int  # bytes
    tune: bool
    threads: int
    device: str  # of PyTorch, where the graph runs
    journal: Journal  # holds matrices and gradients of an earlier run and receives new ones
    progress: Progress


@dataclass(frozen=True)
class Outcome:
    """Results of a run other than the matrices."""

    norms: dict[str, NDArray[np.float32]]  # these replace the norms of the file
    notes: list[str]  # for the report


@dataclass(frozen=True)
class BestRun:
    """A run over one model that `prepare` found to be supported."""

    reader: Reader
    executor: Executor
    pairs: Sequence[Pair]
    logits: bool  # whether the graph's output is logits, not an embedding
    chunks: list[NDArray[np.int32]]
    plans: list[TensorPlan]
    setting: Setting
    matrices: frozenset[str]  # to be quantized stage by stage
    tables: frozenset[str]  # to be quantized as what is looked up; an output matrix may be tied to it

    @property
    def names(self) -> frozenset[str]:
        """The weights that `run` quantizes."""
        return self.matrices | self.tables

    @property
    def _types(self) -> dict[str, str]:
        """The type of each of `names`."""
        return {plan.source.name: plan.type_name for plan in self.plans if plan.source.name in self.names}

    def run(self, finish: Finish) -> Outcome:
        """Quantizes every weight of `names`; calls `finish` with each when it is done."""
        setting, executor = self.setting, self.executor
        options, memory, journal, progress = setting.options, setting.memory, setting.journal, setting.progress
        notes: list[str] = []
        plan = parts.stages(executor.graph, self.matrices)
        chunks = self._affordable(plan, notes)
        chunk = len(chunks[0])
        batches = batches_of(chunks, chunk * shares.chunks_at_once(memory, chunk, self._largest()))
        n_tokens = sum(map(len, chunks))
        grams = self._grams(notes)
        sensitivity = measure(
            executor, plan, batches, grams, journal,
            lambda done: progress("sensitivity", done, n_tokens, "gradients"), tables=self.tables, logits=self.logits,
        )  # fmt: skip
        tables = {
            name: _table(executor.weight(name), name, self._types[name], sensitivity, options) for name in self.tables
        }
        for name, table in tables.items():
            finish(name, [table])
        if not plan.stages:  # a budget may give every other matrix a larger type
            return Outcome({}, notes)
        run = Sequential(
            executor, plan, self._types, batches, sensitivity, options, stored=self._stored(tables), pairs=self.pairs,
            movable=self._are_plain, room=shares.for_feedback(memory),
        )  # fmt: skip

        weights = sum(self.reader.tensors[name].n_elements for name in self.matrices)

        def report(done: int, total: int, name: str) -> None:  # weights count by what they cost
            progress("quantize", weights * done // max(total, 1), weights, name)

        needed = tune.bytes_needed(sum(plan.source.n_elements for plan in self.plans), self._largest())
        if not setting.tune or needed > memory:
            if setting.tune:
                notes.append(
                    f"norms and scales were not tuned: tuning needs {needed >> 20} MiB, --memory allows "
                    f"{memory >> 20} MiB"
                )
            return Outcome(_arrays(run.run(journal, report, finish)), notes)
        matrices: dict[str, Matrices] = {}
        norms = run.run(journal, report, matrices.__setitem__)
        tuned = tune.tune(
            executor,
            batches_of(chunks, _TUNE_TOKENS),
            matrices,
            norms,
            trained=[name for name in parts.norms(executor.graph) if self._are_plain([name])],
            stored=self._stored(tables),
            logits=self.logits,
            epochs=_EPOCHS,
            progress=lambda done, total: progress("tune", done, total, "norms and scales"),
        )
        if tuned.matrices:
            matrices, norms = tuned.matrices, norms | tuned.norms
        else:
            notes.append("norms and scales were not tuned: tuning did not help on held-out text")
        for name, made in matrices.items():
            finish(name, made)
        return Outcome(_arrays(norms), notes)

    def _are_plain(self, names: Sequence[str]) -> bool:
        """Whether these tensors can change without rounding."""
        return all(self.reader.tensors[name].type_name == "f32" for name in names)

    def _grams(self, notes: list[str]) -> set[str]:
        """The matrices whose rows compensate for each other's errors."""
        shapes = {name: self.reader.tensors[name].shape for name in self.matrices}
        rows = {name: shape[0] for name, shape in shapes.items() if len(shape) == 2}
        found = affordable(rows, shares.for_grams(self.setting.memory))
        if len(found) < len(rows):
            notes.append(
                f"in {len(rows) - len(found)} of {len(rows)} matrices rows do not compensate for each other's errors; "
                "a larger --memory includes all matrices"
            )
        return found

    def _largest(self) -> int:
        """How many numbers the largest value has, for one chunk."""
        return max(math.prod(node.shape) for node in self.executor.graph.nodes if node.varies)

    def _affordable(self, plan: parts.Plan, notes: list[str]) -> list[NDArray[np.int32]]:
        """As many chunks, evenly chosen, as fit into memory for both streams."""
        room = shares.chunks_of_text(self.setting.memory, parts.numbers_alive(self.executor.graph, plan))
        total = len(self.chunks)
        if total <= room:
            return self.chunks
        notes.append(f"calibrated on {room} of {total} chunks of text; a larger --memory uses all")
        return [self.chunks[i * total // room] for i in range(room)]

    def _stored(self, tables: Mapping[str, Quantized]) -> dict[str, torch.Tensor]:
        """The tables, and embedding and output matrix, as the file will hold them."""
        found = {name: applied(table, self.executor.device)[1] for name, table in tables.items()}
        for plan in self.plans:
            name, new = plan.source.name, plan.type_name
            if name in self.names or name not in (EMBEDDING, OUTPUT):
                continue
            if new not in (*SEARCHED, *FLOATS, plan.source.type_name):
                weights = self.executor.weight(name).cpu().numpy()
                found[name] = torch.from_numpy(stock_types.rounded(weights, new)).to(self.executor.device)
        return found


def prepare(
    reader: Reader, session: Session, context: int, max_tokens: int, plans: list[TensorPlan], setting: Setting
) -> BestRun | str:
    """A run over all weights with searched codes that are multiplied at one place, looked up, or both.

    It uses up to `max_tokens` tokens of the session's text, in chunks of `context`. Returns the reason instead if this
    model is not supported.
    """
    model = session.model
    chunks = session.chunks(session.chunk_size(context), max_tokens, equal=True)
    try:
        executor = open_graph(
            reader, model, chunks[0], shares.for_weights(setting.memory), setting.threads, setting.device
        )
        graph = executor.graph
        used, looked_up = parts.products(graph), parts.lookups(graph)
        wanted = {plan.source.name for plan in plans if plan.searched}
        matrices = {name for name in wanted if used.get(name) == 1 and name not in looked_up}
        pairs: list[Pair] = []
        if setting.options.equalize:
            tokens = chunks[0][:_TRIED_TOKENS]
            few = Executor(graph_for(reader, model, tokens, setting.threads), executor.weight, 0, executor.device)
            pairs = levelled(few, matrices, torch.from_numpy(tokens.astype(np.int64))[None])
    except Unsupported as e:
        return str(e)
    tables = frozenset(name for name in wanted & looked_up if used.get(name, 0) <= 1)
    logits = not model.facts.embeds
    return BestRun(reader, executor, pairs, logits, chunks, plans, setting, frozenset(matrices), tables)


def _arrays(norms: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: norm.cpu().numpy() for name, norm in norms.items()}


def _table(
    table: torch.Tensor, name: str, type_name: str, sensitivity: Sensitivity, options: MatrixOptions
) -> Quantized:
    """A matrix whose rows are looked up, quantized by what errors in them cost (`fisher`)."""
    stats, square = None, sensitivity.squares.get(name)
    if square is not None and options.error_feedback:
        hessian = square.cpu().numpy()
        stats = InputStats(1, hessian.diagonal().copy(), hessian=hessian)
    prepared = typed.prepare(type_name, stats, table.shape[1], 0, options, consume=False)
    return typed.quantize(table.cpu().numpy(), prepared, options, name)
