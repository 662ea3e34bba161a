"""Runs text through the model in llama.cpp and gathers statistics of what the weights are multiplied with.

llama.cpp calls back for each node of its graph (context parameter `cb_eval`), so this works for every architecture it
runs. Weights that read the same tensor (q, k and v; gate and up) share one set of statistics.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from agq_gguf.calibration.accumulate import SAMPLE_ROWS, Accumulator, finish
from agq_gguf.calibration.session import Session
from agq_gguf.calibration.stats import WeightStats
from agq_gguf.runtime.ggml import Ggml, GgmlTensor, ggml
from agq_gguf.runtime.model import Batch

# The first token of a text is where attention rests that is needed nowhere (arXiv 2309.17453): all tokens read its key
# and its value, which then matter 28 to 470 times as much as others', by the gradients of SmolLM2-135M.
_SINK_WEIGHT = 100.0
_KEYS_AND_VALUES = re.compile(r"attn_(k|v|qkv|kv\w*)\.weight$")


@dataclass(frozen=True)
class Input:
    """One tensor that weights are multiplied with; the first weight in the graph stands for all of them."""

    weights: tuple[str, ...]
    columns: int
    experts: int  # 0: an ordinary product
    norms: tuple[str, ...] = ()  # the weight (and bias) that make it, if nothing else sees what they make

    @property
    def first_weight(self) -> float:
        """How often the first token of a text counts in the Hessian."""
        return _SINK_WEIGHT if any(map(_KEYS_AND_VALUES.search, self.weights)) else 1.0


class Calibrator:
    """Runs the chunks of a session's text and looks at the inputs of weights; a context manager.

    `wanted` maps the names of the weights to learn about to their shapes. Raises InputError when `context` is too
    small, HostError when the installed llama.cpp is not laid out as expected.
    """

    def __init__(
        self,
        session: Session,
        wanted: Mapping[str, tuple[int, ...]],
        *,
        context: int = 512,
        max_tokens: int = 32768,
        threads: int = 0,
    ):
        self._wanted, self._model = wanted, session.model
        self._visit: Callable[[GgmlTensor, bool], bool] = lambda node, ask: False
        self._failure: BaseException | None = None
        self._stopped = False  # whether the callback ended the graph that ran last
        self._ggml: Ggml = ggml()
        size = session.chunk_size(context)
        self.chunks = session.chunks(size, max_tokens)
        with ExitStack() as stack:
            self._context = stack.enter_context(
                self._model.context(size, n_ubatch=size, threads=threads, eval_callback=self._on_node)
            )
            self.inputs = self._discover()
            self._open = stack.pop_all()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        text: Iterable[str],
        wanted: Mapping[str, tuple[int, ...]],
        *,
        context: int = 512,
        max_tokens: int = 32768,
        threads: int = 0,
    ) -> Calibrator:
        """A calibrator with a session of its own, which it closes. Raises InputError or HostError, as both do."""
        with ExitStack() as stack:
            session = stack.enter_context(Session(path, text))
            made = cls(session, wanted, context=context, max_tokens=max_tokens, threads=threads)
            stack.push(made._open)
            made._open = stack.pop_all()
        return made

    @property
    def n_tokens(self) -> int:
        """Tokens that one pass runs through the model."""
        return sum(map(len, self.chunks))

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [n, vocabulary] of the float model for a text of its own of at most a chunk's length."""
        self._visit = lambda node, ask: False
        self._context.clear()
        batch = Batch(tokens, first_logits=0)
        self._context.decode(batch)
        return self._context.logits(batch).copy()

    def passes(self, memory: int, hessians: bool = True) -> list[list[Input]]:
        """Splits the inputs, in the order of the graph, so that the Hessians of each part fit into `memory` bytes."""
        if not hessians:
            return [self.inputs]
        parts: list[list[Input]] = [[]]
        used = 0
        for found in self.inputs:
            need = 4 * found.columns**2 * self._matrices(found, memory)
            if parts[-1] and used + need > memory:
                parts.append([])
                used = 0
            parts[-1].append(found)
            used += need
        return parts

    @staticmethod
    def _matrices(found: Input, memory: int) -> int:
        """Hessians kept for an input: one for each expert if they fit into the memory, else one for all."""
        return found.experts if 4 * found.columns**2 * found.experts <= memory and found.experts else 1

    def pooled(self, memory: int) -> list[str]:
        """Expert weights whose experts share one Hessian because one for each would not fit into `memory` bytes."""
        return [
            name
            for found in self.inputs
            if found.experts > 1 and self._matrices(found, memory) == 1
            for name in found.weights
        ]

    def collect(
        self, part: list[Input], memory: int, progress: Callable[[int], None], hessians: bool = True
    ) -> list[WeightStats]:
        """Runs the text once and returns the statistics of the inputs in `part`."""
        rows = -(-SAMPLE_ROWS // len(self.chunks))
        sums: dict[str, list[Accumulator]] = {}
        for found in part:
            split = found.experts and (not hessians or self._matrices(found, memory) > 1)
            first = found.first_weight if self._model.facts.causal and not self._model.has_encoder else 1.0
            keep = [Accumulator(found.columns, rows, hessians, first) for _ in range(found.experts if split else 1)]
            sums[found.weights[0]] = keep
        last = part[-1].weights[0]

        def visit(node: GgmlTensor, ask: bool) -> bool:
            name = self._weight_of(node)
            if name not in sums:
                return False
            if not ask:
                self._add(node, sums[name])
            return ask or name != last  # nothing behind the last input is of interest: stop the graph there

        self._visit = visit
        done = 0
        for chunk in self.chunks:
            self._run(chunk)
            done += len(chunk)
            progress(done)
        return [finish(sums[found.weights[0]]) for found in part]

    def _run(self, chunk: NDArray[np.int32]) -> None:
        """Runs one chunk from scratch; an exception from the callback is raised here."""
        self._context.clear()
        self._stopped = False
        if self._model.has_encoder and self._model.has_decoder:
            self._run_both(chunk)
        elif self._model.has_encoder:
            self._context.encode(Batch(chunk, first_logits=0))
        else:
            # All logits are asked for: else the last layer would skip the tokens whose result nobody reads.
            self._context.decode(Batch(chunk, first_logits=0))
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run_both(self, chunk: NDArray[np.int32]) -> None:
        """Encoder and decoder: the first half of the chunk is read, the second half said."""
        half = len(chunk) // 2
        self._context.encode(Batch(chunk[:half], first_logits=0))
        if not self._stopped:  # else the decoder is of no interest, and nothing is there for it to look at
            start = np.array([self._model.decoder_start], np.int32)
            self._context.decode(Batch(np.concatenate([start, chunk[half:-1]]), first_logits=0))

    # the graph

    def _on_node(self, node: int, ask: bool) -> bool:
        """What llama.cpp calls; no exception may pass through its C code."""
        try:
            go_on = self._failure is None and self._visit(GgmlTensor.from_address(node), ask)
            self._stopped |= not ask and not go_on
            return go_on
        except BaseException as e:
            self._failure, self._stopped = e, True
            return False

    def _weight_of(self, node: GgmlTensor) -> str:
        """Name of the wanted weight that the node multiplies with, or ''."""
        if node.op not in (self._ggml.mul_mat, self._ggml.mul_mat_id):
            return ""
        name: str = node.src[0].contents.name.decode("utf-8", "surrogateescape")
        return name if name in self._wanted else ""

    def _discover(self) -> list[Input]:
        """Which weights share an input and which norm makes it, from one look at the graph."""
        found: dict[int, list[str]] = {}
        norms: dict[int, dict[str, int]] = {}
        readers: Counter[int] = Counter()
        products: Counter[int] = Counter()
        seen: set[str] = set()

        def visit(node: GgmlTensor, ask: bool) -> bool:
            readers.update(ctypes.addressof(source.contents) for source in node.src if source)
            name = self._weight_of(node)
            if name:
                source = ctypes.addressof(node.src[1].contents)
                products[source] += 1
                norms[source] = self._norms_of(node.src[1].contents)
                if name not in seen:
                    seen.add(name)
                    found.setdefault(source, []).append(name)
            return False

        self._visit = visit
        self._run(self.chunks[0][:2])
        shapes = self._wanted
        inputs = []
        for source, names in found.items():
            # Nobody else may read what the norm makes, nor the norm's own vectors.
            alone = readers[source] == products[source] == len(names)
            alone = alone and all(readers[address] == 1 for address in norms[source].values())
            experts = shapes[names[0]][0] if len(shapes[names[0]]) == 3 else 0
            made_by = tuple(name for name in norms[source] if name) if alone else ()
            inputs.append(Input(tuple(names), shapes[names[0]][-1], experts, made_by))
        return inputs

    def _norms_of(self, made: GgmlTensor) -> dict[str, int]:
        """Name -> address of weight and bias if `made` is norm(x) * weight (+ bias), else nothing.

        Between them stands the product under the name "", which must have one reader, too.
        """
        found: dict[str, int] = {}
        for op in (self._ggml.add, self._ggml.mul):
            if made.op == op and made.src[0] and made.src[1]:
                vector, before = made.src[1].contents, made.src[0].contents
                if vector.op or list(vector.ne[1:]) != [1, 1, 1]:
                    return {}
                found[vector.name.decode("utf-8", "surrogateescape")] = ctypes.addressof(vector)
                if op == self._ggml.mul:
                    return found if before.op in self._ggml.norms else {}
                found[""] = ctypes.addressof(before)
                made = before
        return {}

    def _add(self, node: GgmlTensor, sums: list[Accumulator]) -> None:
        x = self._ggml.floats(node.src[1].contents)
        if len(sums) == 1:
            sums[0].add(x.reshape(-1, x.shape[-1]))
            return
        x = x[0]  # [tokens, slots, K], slots being 1 where all experts see the same
        ids = self._ggml.integers(node.src[2].contents)[0, 0]  # [tokens, used]
        for expert, total in enumerate(sums):
            token, slot = np.nonzero(ids == expert)
            total.add(x[token, slot % x.shape[1]])

    # closing

    def close(self) -> None:
        """Frees the context, and the session if it is its own."""
        self._open.close()

    def __enter__(self) -> Calibrator:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
