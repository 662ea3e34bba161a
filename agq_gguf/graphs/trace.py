"""Records the graph that llama.cpp builds for one chunk of tokens: nodes in order, leaves, and what small leaves hold.

The eval callback is asked about every node before anything is computed, and always answers "not wanted". So inputs
still hold what llama.cpp has set, and recording costs one ordinary run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.runtime.ggml import GgmlTensor, ggml
from agq_gguf.runtime.model import Batch, Context, Embeddings, FlashAttention, Model
from agq_gguf.runtime.model_file import POOLING_LAST

TOKENS = "inp_tokens"  # llama.cpp's name of the input that holds the tokens
STATES = "result_embd_pooled"  # llama.cpp's name of what embeddings are read from, also if it pools none
_INPUT_FLAG = 1  # GGML_TENSOR_FLAG_INPUT
_SMALL = 1 << 16  # values of a leaf that are copied even if llama.cpp does not call it an input


@dataclass
class Raw:
    """A copy of one ggml_tensor."""

    address: int
    op: str  # "NONE" for leaves; else by `Ggml.op_name`
    type: str  # "" for weights
    ne: tuple[int, ...]  # in ggml's order, fastest first
    nb: tuple[int, ...]  # bytes
    params: bytes
    src: tuple[int, ...]  # addresses; 0: none
    view_src: int
    view_offs: int
    name: str
    is_input: bool = False
    data: NDArray[Any] | None = None  # of small leaves and inputs [ne3, ne2, ne1, ne0]
    is_zero: bool = False  # of leaves: whether all of the memory is zero

    def i32(self, i: int) -> int:
        """The operation's parameter number `i` as an integer."""
        return int(np.frombuffer(self.params, np.int32)[i])

    def f32(self, i: int) -> float:
        """The operation's parameter number `i` as a float."""
        return float(np.frombuffer(self.params, np.float32)[i])


@dataclass
class Trace:
    """A graph: `nodes` in the order in which they run, and `tensors` (nodes and leaves), both by address."""

    nodes: list[int] = field(default_factory=list)
    tensors: dict[int, Raw] = field(default_factory=dict)


def record(
    model: Model,
    texts: Sequence[NDArray[np.int32]],
    weights: Collection[str],
    *,
    flash_attention: FlashAttention = "on",
    threads: int = 1,
) -> list[Trace]:
    """The graph for each of the texts, which have one length and start from an empty F32 cache.

    `weights` are the names of the file's tensors. Raises Unsupported if llama.cpp runs more than one graph for a text.
    """
    recorder = Recorder(weights)
    found = []
    with open_context(
        model, len(texts[0]), flash_attention=flash_attention, threads=threads, eval_callback=recorder.on_node
    ) as context:
        for tokens in texts:
            run(context, tokens)
            found.append(recorder.take())
    return found


def open_context(model: Model, n_tokens: int, **options: Any) -> Context:
    """A context in which a graph of `n_tokens` tokens has the precision of F32. Raises Unsupported for two graphs.

    A model that takes the last token's embedding for the text's gives those of all tokens: each ends a shorter text.
    """
    if model.has_encoder and model.has_decoder:
        raise Unsupported("it has an encoder and a decoder: two graphs, of which one reads what the other has made")
    embeddings: Embeddings = "tokens" if model.facts.pooling == POOLING_LAST else "pooled"
    return model.context(
        n_tokens, n_ubatch=n_tokens, cache="f32", embeddings=embeddings if model.facts.embeds else "none", **options
    )


def run(context: Context, tokens: NDArray[np.int32]) -> Batch:
    """Runs a text from an empty cache and asks for all outputs; else the last layer would skip tokens."""
    context.clear(zero=True)
    batch = Batch(tokens, first_logits=0)
    context.run(batch)
    return batch


class Recorder:
    """Records the graphs of a context whose eval callback is `on_node`. `weights` are names of the file's tensors."""

    def __init__(self, weights: Collection[str]) -> None:
        self._weights, self._ggml = weights, ggml()
        self._trace = Trace()
        self._seen: set[int] = set()
        self._failure: BaseException | None = None

    def take(self) -> Trace:
        """What was recorded since the last call; raises what went wrong meanwhile."""
        failure, self._failure = self._failure, None
        found, self._trace = self._trace, Trace()
        self._seen.clear()
        if failure is not None:
            raise failure
        return found

    def on_node(self, address: int, ask: bool) -> bool:
        """Called by llama.cpp; no exception may pass through its C code."""
        try:
            if self._failure is None:
                if address in self._seen:
                    raise Unsupported("llama.cpp runs more than one graph for a chunk of text")
                self._seen.add(address)
                self._keep(address)
                self._trace.nodes.append(address)
        except BaseException as e:
            self._failure = e
        return not ask  # never wanted; a node that is computed all the same does not end the graph

    def _keep(self, address: int) -> None:
        todo = [address]
        while todo:
            address = todo.pop()
            if address in self._trace.tensors:
                continue
            raw = self._copied(address)
            self._trace.tensors[address] = raw
            todo += [other for other in (*raw.src, raw.view_src) if other]

    def _copied(self, address: int) -> Raw:
        t = GgmlTensor.from_address(address)
        name, op = t.name.decode("utf-8", "surrogateescape"), self._ggml.op_name(t)
        weight = name in self._weights and op == "NONE"
        raw = Raw(
            address,
            op,
            "" if weight else self._ggml.type_name(t),
            tuple(t.ne),
            tuple(t.nb),
            bytes(t.op_params),
            tuple(ctypes.addressof(s.contents) if s else 0 for s in t.src),
            ctypes.addressof(t.view_src.contents) if t.view_src else 0,
            t.view_offs,
            name,
            bool(t.flags & _INPUT_FLAG),
        )
        if op == "NONE" and not raw.view_src and not weight:
            values = self._ggml.values(t)
            if values is not None:
                raw.is_zero = not values.any()
                if raw.is_input or values.size < _SMALL:
                    raw.data = values.copy()
        return raw
