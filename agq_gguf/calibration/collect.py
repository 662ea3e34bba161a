"""Runs a text through the model in llama.cpp and collects statistics of the weights' inputs.

llama.cpp calls back for each node of its graph (context parameter `cb_eval`), so this works for every architecture that
llama.cpp runs. Weights that read the same tensor (q, k and v; gate and up) share one set of statistics.
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
from agq_gguf.calibration.memory import hessian_bytes, hessians_that_fit, work_bytes
from agq_gguf.calibration.session import Session
from agq_gguf.calibration.stats import WeightStats
from agq_gguf.runtime.ggml import Ggml, GgmlTensor, ggml
from agq_gguf.runtime.model import Batch

# When a head has nothing to attend to, it attends to the first token of a text (arXiv 2309.17453). So all tokens read
# its key and its value, which then matter 28 to 470 times as much as others', by the gradients of SmolLM2-135M.
_SINK_WEIGHT = 100.0
_KEYS_AND_VALUES = re.compile(r"attn_(k|v|qkv|kv\w*)\.weight$")


@dataclass(frozen=True)
class Input:
    """A tensor that one or more weights are multiplied with; the first weight in the graph identifies it."""

    weights: tuple[str, ...]
    columns: int
    experts: int  # 0: not a product with experts
    norms: tuple[str, ...] = ()  # weight (and bias) of the norm that produces it, if nothing else reads its output

    @property
    def first_weight(self) -> float:
        """Weight of the first token of a text in the Hessian."""
        return _SINK_WEIGHT if any(map(_KEYS_AND_VALUES.search, self.weights)) else 1.0


class Calibrator:
    """Runs the chunks of a session's text and reads the inputs of weights; a context manager.

    `wanted` maps the names of the weights to their shapes. Raises InputError if `context` is too small, HostError if
    the tensors of the installed llama.cpp are not laid out as expected.
    """

    def __init__(
        self,
        session: Session,
        wanted: Mapping[str, tuple[int, ...]],
        *,
        context: int = 512,
        max_tokens: int = 32768,
        threads: int = 0,
    ) -> None:
        self._wanted, self._model = wanted, session.model
        self._visit: Callable[[GgmlTensor, bool], bool] = lambda node, ask: False
        self._failure: BaseException | None = None
        self._stopped = False  # whether the callback stopped the last graph early
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
        """A calibrator that opens and closes its own session. Raises InputError or HostError, as both do."""
        with ExitStack() as stack:
            session = stack.enter_context(Session(path, text))
            made = cls(session, wanted, context=context, max_tokens=max_tokens, threads=threads)
            stack.push(made._open)
            made._open = stack.pop_all()
        return made

    @property
    def n_tokens(self) -> int:
        """Number of tokens in one pass over the text."""
        return sum(map(len, self.chunks))

    def passes(self, memory: int, hessians: bool = True) -> list[list[Input]]:
        """Splits the inputs, in graph order, into parts whose Hessians fit into `memory` bytes."""
        if not hessians:
            return [self.inputs]
        parts: list[list[Input]] = [[]]
        held = work = 0
        for found in self.inputs:
            count = hessians_that_fit(found.columns, found.experts, memory)
            need, most = count * hessian_bytes(found.columns), work_bytes(found.columns) if count else 0
            if parts[-1] and held + need + max(work, most) > memory:
                parts.append([])
                held = work = 0
            parts[-1].append(found)
            held, work = held + need, max(work, most)
        return parts

    def pooled(self, memory: int) -> list[str]:
        """Weights whose experts share one Hessian, because one for each expert does not fit into `memory` bytes."""
        return [
            name
            for found in self.inputs
            if found.experts > 1 and hessians_that_fit(found.columns, found.experts, memory) == 1
            for name in found.weights
        ]

    def too_large(self, memory: int) -> list[Input]:
        """Inputs whose Hessian does not fit into `memory` bytes."""
        return [found for found in self.inputs if not hessians_that_fit(found.columns, found.experts, memory)]

    def collect(
        self, part: list[Input], memory: int, progress: Callable[[int], None], hessians: bool = True
    ) -> list[WeightStats]:
        """Runs the text once and returns the statistics of the inputs in `part`."""
        rows = -(-SAMPLE_ROWS // len(self.chunks))
        sums: dict[str, list[Accumulator]] = {}
        for found in part:
            count = hessians_that_fit(found.columns, found.experts, memory) if hessians else 0
            split = found.experts and count != 1  # without Hessians, each expert's own statistics are small
            first = found.first_weight if self._model.facts.causal and not self._model.has_encoder else 1.0
            keep = [Accumulator(found.columns, rows, count > 0, first) for _ in range(found.experts if split else 1)]
            sums[found.weights[0]] = keep
        last = part[-1].weights[0]

        def visit(node: GgmlTensor, ask: bool) -> bool:
            name = self._weight_of(node)
            if name not in sums:
                return False
            if not ask:
                self._add(node, sums[name])
            return ask or name != last  # stop the graph after the last input; the rest is not needed

        self._visit = visit
        done = 0
        for chunk in self.chunks:
            self._run(chunk)
            done += len(chunk)
            progress(done)
        return [finish(sums[found.weights[0]]) for found in part]

    def _run(self, chunk: NDArray[np.int32]) -> None:
        """Runs one chunk from an empty cache; raises the exception of the callback, if any."""
        self._context.clear()
        self._stopped = False
        if self._model.has_encoder and self._model.has_decoder:
            self._run_both(chunk)
        else:
            # Requests all logits; otherwise the last layer would skip tokens without logits.
            self._context.run(Batch(chunk, first_logits=0))
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run_both(self, chunk: NDArray[np.int32]) -> None:
        """Runs the first half of the chunk through the encoder and the second half through the decoder."""
        half = len(chunk) // 2
        self._context.encode(Batch(chunk[:half], first_logits=0))
        if not self._stopped:  # otherwise the decoder is not needed, and the encoder's output is incomplete
            start = np.array([self._model.decoder_start], np.int32)
            self._context.decode(Batch(np.concatenate([start, chunk[half:-1]]), first_logits=0))

    # the graph

    def _on_node(self, node: int, ask: bool) -> bool:
        """Called by llama.cpp; no exception may pass through its C code."""
        try:
            go_on = self._failure is None and self._visit(GgmlTensor.from_address(node), ask)
            self._stopped |= not ask and not go_on
            return go_on
        except BaseException as e:
            self._failure, self._stopped = e, True
            return False

    def _weight_of(self, node: GgmlTensor) -> str:
        """Name of the wanted weight in the node's product, or ''."""
        if node.op not in (self._ggml.mul_mat, self._ggml.mul_mat_id):
            return ""
        name: str = node.src[0].contents.name.decode("utf-8", "surrogateescape")
        return name if name in self._wanted else ""

    def _discover(self) -> list[Input]:
        """The inputs, the weights that share them and the norms that produce them, from one run of the graph."""
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
            # No other node may read the output of the norm, nor its weight and bias.
            alone = readers[source] == products[source] == len(names)
            alone = alone and all(readers[address] == 1 for address in norms[source].values())
            experts = shapes[names[0]][0] if len(shapes[names[0]]) == 3 else 0
            made_by = tuple(name for name in norms[source] if name) if alone else ()
            inputs.append(Input(tuple(names), shapes[names[0]][-1], experts, made_by))
        return inputs

    def _norms_of(self, made: GgmlTensor) -> dict[str, int]:
        """Name -> address of weight and bias if `made` is norm(x) * weight (+ bias), else nothing.

        The product norm(x) * weight is included under the name "", because it must have only one reader, too.
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
        x = x[0]  # [tokens, slots, K]; one slot if all experts have the same input
        ids = self._ggml.integers(node.src[2].contents)[0, 0]  # [tokens, used]
        for expert, total in enumerate(sums):
            token, slot = np.nonzero(ids == expert)
            total.add(x[token, slot % x.shape[1]])

    # closing

    def close(self) -> None:
        """Frees the context, and the session if `open` made it."""
        self._open.close()

    def __enter__(self) -> Calibrator:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
