"""Opens a model's graph in PyTorch, if it computes what llama.cpp computes; else says why not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.errors import AgqError, HostError
from agq_gguf.gguf_io.reader import FLOATS, Reader
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.graphs.ir import Graph, check_inputs, translate
from agq_gguf.graphs.ops.arithmetic import BY_TABLE
from agq_gguf.graphs.ops.indices import CHOICES
from agq_gguf.graphs.run import Executor, Reading
from agq_gguf.graphs.trace import STATES, open_context, record, run
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.runtime.model import Model
from agq_gguf.runtime.model_file import POOLING_LAST, POOLING_RANK

# The largest relative difference of outputs. llama.cpp rounds the input of a product to the type of the weight, and
# takes GELU from a table of F16 values.
_EXACT, _ROUGH, _BF16, _CODED = 1e-5, 1e-3, 1e-2, 1e-1  # coded: activations have 8 bits
# In some models rounding alone makes a larger difference, layer by layer. So many times of what it makes is allowed.
_TIMES_ROUNDING, _MOST = 3, 1e-2
_ROUNDED = {"f16": torch.float16, "bf16": torch.bfloat16}  # by the type of the weight: that of the product's input
_TRIED_TOKENS = 32


def open_graph(
    reader: Reader, model: Model, tokens: NDArray[np.int32], cache: int, threads: int = 1, device: str = "cpu"
) -> Executor:
    """The graph for texts of `len(tokens)` tokens, which gives llama.cpp's outputs for `tokens`.

    It runs on a device of PyTorch and keeps up to `cache` bytes of weights. Raises Unsupported with the reason if there
    is none.
    """
    graph = graph_for(reader, model, tokens, threads)
    try:
        executor = Executor(graph, lambda name: torch.from_numpy(reader.read(name)), cache, device)
        found, most = difference(executor, model, tokens, threads), tolerance(graph, reader)
        if found > most:
            most = max(most, min(_TIMES_ROUNDING * rounding(executor, reader, tokens), _MOST))
    except (RuntimeError, ValueError, IndexError) as e:  # an operation in a form that was never seen
        raise Unsupported(
            f"PyTorch cannot run its graph: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        ) from e
    if not found <= most:
        what = "embeddings" if model.facts.embeds else "logits"
        raise Unsupported(f"its {what} in PyTorch differ from those of llama.cpp by {found:.1e}, more than {most:.0e}")
    return executor


def graph_for(reader: Reader, model: Model, tokens: NDArray[np.int32], threads: int = 1) -> Graph:
    """llama.cpp's graph for texts of `len(tokens)` tokens, not checked. Raises Unsupported."""
    try:
        return _graph_for(reader, model, tokens, threads)
    except HostError as e:
        raise Unsupported(str(e)) from e


def _graph_for(reader: Reader, model: Model, tokens: NDArray[np.int32], threads: int) -> Graph:
    if model.facts.pooling == POOLING_RANK:
        raise Unsupported("it gives a score and no embedding")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors.values()}
    other = np.roll(tokens, len(tokens) // 2 + 1)
    if np.array_equal(other, tokens):
        other = (tokens + 1) % model.n_vocab
    first, second = record(model, [tokens, other.astype(np.int32)], shapes, threads=threads)
    check_inputs(first, second)
    graph = translate(first, shapes, output=STATES if model.facts.pooling == POOLING_LAST else "")
    for node in graph.nodes:
        if node.op == "WEIGHT" and reader.tensors[node.attr].type_name not in (*FLOATS, *reader.decoders):
            raise Unsupported(f"its tensor {node.attr} is of type {reader.tensors[node.attr].type_name}")
    return graph


def tolerance(graph: Graph, reader: Reader) -> float:
    """The relative difference between llama.cpp's outputs and ours that its arithmetic explains."""
    types = {reader.tensors[name].type_name for i in range(len(graph.nodes)) if (name := graph.matrix_of(i))}
    if not types.issubset(FLOATS):
        return _CODED
    if "bf16" in types:
        return _BF16
    return _ROUGH if "f16" in types or any(node.op in BY_TABLE for node in graph.nodes) else _EXACT


def difference(executor: Executor, model: Model, tokens: NDArray[np.int32], threads: int = 1) -> float:
    """The relative difference between llama.cpp's outputs for `tokens` and ours; NaN counts as infinite.

    llama.cpp runs without flash attention and with an F32 cache. Where tokens choose (experts), the typical token
    decides: at some a choice falls the other way by rounding alone.
    """
    with open_context(model, len(tokens), flash_attention="off", threads=threads) as context:
        batch = run(context, tokens)
        theirs = torch.from_numpy((context.embeddings(batch) if model.facts.embeds else context.logits(batch)).copy())
    return _relative(_output(executor, tokens), theirs, executor.graph)


def rounding(executor: Executor, reader: Reader, tokens: NDArray[np.int32]) -> float:
    """The relative difference of our outputs if the inputs of products are rounded as llama.cpp rounds them."""

    def product(place: Reading) -> torch.Tensor | None:
        kind = _ROUNDED.get(reader.tensors[place.weight].type_name)
        if kind is None or place.given is None:
            return None
        return replace(place, given=place.given.to(kind).float()).of(executor.weight(place.weight))

    exact = _output(executor, tokens)
    with executor.replacing(readings=product):
        return _relative(_output(executor, tokens), exact, executor.graph)


def _output(executor: Executor, tokens: NDArray[np.int32]) -> torch.Tensor:
    with torch.no_grad():
        return executor.forward(torch.from_numpy(tokens.astype(np.int64))[None])[0].cpu()


def _relative(ours: torch.Tensor, theirs: torch.Tensor, graph: Graph) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if any(node.op in CHOICES for node in graph.nodes):
        found = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()
    else:
        found = (ours - theirs).norm() / theirs.norm()
    return float(torch.nan_to_num(found, nan=torch.inf))


def supported(path: str | os.PathLike[str], prepare: Callable[[Reader], None] = lambda reader: None) -> str:
    """Why a model cannot run in PyTorch with gradients; empty if it can. Tries it on a few tokens.

    `prepare` gets the open file: it may add decoders.
    """
    try:
        with open_model(path) as reader, Model(Path(path)) as model:
            prepare(reader)
            tokens = (np.arange(_TRIED_TOKENS) * 7919 % model.n_vocab).astype(np.int32)
            open_graph(reader, model, tokens, 0)
    except Unsupported as e:
        return str(e)
    except AgqError as e:
        return f"llama.cpp cannot run it: {e}"
    return ""
