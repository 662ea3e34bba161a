"""Runs the quality `best`, for models whose graph is in `graphs`.

It has three steps, each in its own module: `fisher` weighs the tokens, `sequential` quantizes stage by stage, `tune`
trains norms and scales. This module gives them their text, their memory and each other's results.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.arguments import Progress
from agq_gguf.calibration.collect import Calibrator
from agq_gguf.format.blocks import TYPE_NAME
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.gguf_io.tensor_names import EMBEDDING, in_layer, layer_of
from agq_gguf.graphs.batches import batches_of
from agq_gguf.graphs.llama import LlamaGraph
from agq_gguf.graphs.registry import graph_of, why_not
from agq_gguf.logits import compare
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import QuantizedMatrix, prepare_input, quantize_matrix
from agq_gguf.matrix.simulate import Rounder, restored
from agq_gguf.quantization import stock_types
from agq_gguf.quantization.best import tune
from agq_gguf.quantization.best.fisher import affordable, measure
from agq_gguf.quantization.best.sequential import Finish, Sequential
from agq_gguf.quantization.resume import Journal
from agq_gguf.quantization.type_plan import TensorPlan

_BATCH_TOKENS = 2048  # run through the graph at one time
_TUNE_TOKENS = 512  # per training step
_EPOCHS = 2
_CHECK_TOKENS = 64
_SAME = 1e-3  # maximum nats per token between llama.cpp and our graph; F16 arithmetic alone causes 1e-6 to 1e-5
_SAME_ROUNDED = 1e-2  # for a quantized source, with which llama.cpp rounds activations to 8 bits; causes 2e-4 to 1e-3


@dataclass(frozen=True)
class Setting:
    """Options and resources of a run."""

    options: MatrixOptions
    memory: int  # bytes
    tune: bool
    journal: Journal  # holds matrices and gradients of an earlier run and receives new ones
    progress: Progress


@dataclass(frozen=True)
class Outcome:
    """Results of a run other than the matrices."""

    norms: dict[str, NDArray[np.float32]]  # these replace the norms of the file
    notes: list[str]  # for the report


class BestRun:
    """A run over one model that `prepare` found to be supported."""

    def __init__(
        self, graph: LlamaGraph, chunks: list[NDArray[np.int32]], plans: list[TensorPlan], setting: Setting
    ) -> None:
        self._graph, self._chunks, self._plans, self._setting = graph, chunks, plans, setting
        self.names = {  # of the matrices that `run` quantizes
            plan.source.name
            for plan in plans
            if plan.type_name == TYPE_NAME
            and (
                layer_of(plan.source.name) is not None
                or (plan.source.name == EMBEDDING and graph.output_name != EMBEDDING)
            )
        }

    def run(self, finish: Finish) -> Outcome:
        """Quantizes every matrix of `names`; calls `finish` with each when it is done."""
        return _run(self._graph, self._chunks, self._plans, self._setting, self.names, finish)


def prepare(reader: Reader, calibrator: Calibrator, plans: list[TensorPlan], setting: Setting) -> BestRun | str:
    """A run over all AGQ4 matrices of the layers, and over an embedding that is only looked up.

    Returns the reason instead if this model is not supported.
    """
    reason = why_not(reader)
    if reason:
        return reason
    graph = graph_of(reader, setting.memory // 4)
    coded = any(tensor.quantized for tensor in reader.tensors.values())
    if _differs(graph, calibrator, _SAME_ROUNDED if coded else _SAME):
        return "its logits in PyTorch differ from those of llama.cpp"
    return BestRun(graph, calibrator.chunks, plans, setting)


def _differs(graph: LlamaGraph, calibrator: Calibrator, most: float) -> bool:
    """Whether the graph's logits differ from llama.cpp's by more nats per token, on the beginning of the text."""
    tokens = calibrator.chunks[0][:_CHECK_TOKENS]
    theirs = calibrator.logits(tokens)
    with torch.no_grad():
        x = graph.embed(torch.from_numpy(tokens.astype(np.int64))[None])
        for layer in range(graph.shape.n_layer):
            x = graph.block(layer, x, graph.linear)
        ours = graph.logits(x)[0].numpy()
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return True
    return not compare(theirs, ours, tokens)[:, 2].mean() < most


def _run(
    graph: LlamaGraph,
    chunks: list[NDArray[np.int32]],
    plans: list[TensorPlan],
    setting: Setting,
    names: set[str],
    finish: Finish,
) -> Outcome:
    options, memory, journal, progress = setting.options, setting.memory, setting.journal, setting.progress
    notes: list[str] = []
    # A tensor that is copied has the weights that the graph reads, whatever their type.
    types = {p.source.name: "f32" if p.type_name == p.source.type_name else p.type_name for p in plans}
    chunks = _affordable(graph, chunks, memory, notes)
    batches = batches_of(chunks, _BATCH_TOKENS)
    n_tokens = sum(map(len, chunks))
    inside = [plan.source for plan in plans if plan.source.name in names - {EMBEDDING}]
    rows = {tensor.name.removesuffix(".weight"): tensor.shape[-2] for tensor in inside}
    grams = affordable(rows, memory // 4)
    if len(grams) < len(rows):
        notes.append(
            f"in {len(rows) - len(grams)} of {len(rows)} matrices rows do not compensate for each other's errors; "
            "a larger --memory includes all matrices"
        )
    sensitivity = measure(
        graph, batches, grams, journal, lambda done: progress("sensitivity", done, n_tokens, "gradients")
    )

    embedding, looked_up = _embedding(graph, types, options)
    if looked_up is not None:
        finish(EMBEDDING, looked_up)
    run = Sequential(graph, batches, names, sensitivity, options, embedding)
    stages = 4 * graph.shape.n_layer

    def report(done: int, name: str) -> None:
        progress("quantize", done, stages, name)

    needed = tune.bytes_needed(sum(plan.source.n_elements for plan in plans))
    if not setting.tune or needed > memory:
        if setting.tune:
            notes.append(
                f"norms and scales were not tuned: tuning needs {needed >> 20} MiB, --memory allows {memory >> 20} MiB"
            )
        return Outcome(_arrays(run.run(journal, report, finish)), notes)
    matrices: dict[str, QuantizedMatrix] = {}
    norms = run.run(journal, report, matrices.__setitem__)
    tuned = tune.tune(
        graph,
        batches_of(chunks, _TUNE_TOKENS),
        matrices,
        norms,
        embedding=embedding,
        output=_stored(graph.tensor(graph.output_name), types[graph.output_name]),
        epochs=_EPOCHS,
        progress=lambda done, total: progress("tune", done, total, "norms and scales"),
    )
    if tuned.matrices:
        matrices, norms = tuned.matrices, norms | tuned.norms
    else:
        notes.append("norms and scales were not tuned: tuning did not help on held-out text")
    for name, matrix in matrices.items():
        finish(name, matrix)
    return Outcome(_arrays(norms), notes)


def _arrays(norms: dict[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: norm.numpy() for name, norm in norms.items()}


def _affordable(
    graph: LlamaGraph, chunks: list[NDArray[np.int32]], memory: int, notes: list[str]
) -> list[NDArray[np.int32]]:
    """As many chunks, evenly chosen, as fit into memory for both streams."""
    width = graph.tensor(EMBEDDING).shape[1]
    inner = max(graph.tensor(in_layer(i, "ffn_down.weight")).shape[1] for i in range(min(1, graph.shape.n_layer)))
    token_bytes = 4 * (2 * (width + inner) + 2 * inner)
    total = sum(map(len, chunks))
    room = max(memory // 2 // token_bytes, len(chunks[0]))
    if total <= room:
        return chunks
    n = max(1, len(chunks) * room // total)
    notes.append(f"calibrated on {n} of {len(chunks)} chunks of text; a larger --memory uses all")
    return [chunks[i * len(chunks) // n] for i in range(n)]


def _embedding(
    graph: LlamaGraph, types: dict[str, str], options: MatrixOptions
) -> tuple[torch.Tensor | None, QuantizedMatrix | None]:
    """The embedding of the quantized model, and its matrix if it is AGQ4."""
    table = graph.tensor(EMBEDDING)
    if types[EMBEDDING] != TYPE_NAME or graph.output_name == EMBEDDING:
        return _stored(table, types[EMBEDDING]), None
    found = quantize_matrix(table.numpy(), prepare_input(None, table.shape[1], 0, options), options, EMBEDDING)
    return restored(found.matrix, Rounder(found.matrix.parameters, table.shape[1])), found


def _stored(weights: torch.Tensor, type_name: str) -> torch.Tensor | None:
    """Weights after conversion to one of ggml's types and back; None if that changes almost nothing, or for AGQ4."""
    if type_name in (TYPE_NAME, "f32", "f16", "bf16"):
        return None
    return torch.from_numpy(stock_types.rounded(weights.numpy(), type_name))
