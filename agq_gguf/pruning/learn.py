"""Learns from a text to predict how important a token is, from its state in a layer.

The model reads pieces of the text without pruning, and llama.cpp calls back with the states and the attention of each
layer. A token is worth keeping if two things hold. Tokens after the prompt attend to it in later layers. And its state
changes much until then; otherwise its keys and values can be computed from the state in which it is dropped. The
logarithm of the product of both is fitted by a linear function of the state (normalized by its root mean square). That
function is the direction of the score `learned` in docs/pruning.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import HostError, InputError
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.graphs.ir import translate
from agq_gguf.graphs.layers import layers as layers_of
from agq_gguf.graphs.trace import Recorder
from agq_gguf.graphs.unsupported import Unsupported
from agq_gguf.pruning.trial import MAX_PIECES
from agq_gguf.runtime.ggml import GgmlTensor, ggml
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.runtime.plugin import options

_FLOOR = 1e-3  # added to every worth, as a share of the mean, so that its logarithm is finite
_RIDGE = 1e-2  # minimum; larger if there are few tokens for the channels of a state


@dataclass
class Seen:
    """States and attention of the tokens of one prompt, by layer; without the last layer's output."""

    states: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # after the attention, normalized [T, E]
    outputs: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # after the layer, normalized [T, E]
    looks: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # attention of later tokens to each token [T]


def normalized(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to a root mean square of 1; rows of zeros stay zero."""
    scale = np.sqrt(np.square(x, dtype=np.float64).mean(-1, keepdims=True))
    return (x / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.float32)


def worth_keeping(seen: Seen, layer: int) -> NDArray[np.float64]:
    """How much later layers would lose if each token were dropped after the attention of this layer [T]."""
    worth = np.zeros(len(seen.states[layer]))
    for later, looks in seen.looks.items():
        if later > layer:
            change = np.square(seen.outputs[later - 1] - seen.states[layer], dtype=np.float64).mean(-1)
            worth += looks * change
    return worth


class Fit:
    """Fits the logarithm of `worth_keeping` to the state by least squares, from sums over tokens."""

    def __init__(self) -> None:
        self._n = 0
        self._floor = 0.0
        self._x: Any = 0.0
        self._y: Any = 0.0
        self._xx: Any = 0.0
        self._xy: Any = 0.0

    def add(self, states: NDArray[np.float32], worth: NDArray[np.float64]) -> None:
        """Adds the tokens of a prompt."""
        self._floor = self._floor or _FLOOR * float(worth.mean()) or 1.0
        y = np.log(worth + self._floor)
        self._n += len(y)
        self._x, self._y = self._x + states.sum(0, dtype=np.float64), self._y + y.sum()
        self._xx, self._xy = self._xx + (states.T @ states).astype(np.float64), self._xy + states.T @ y

    def direction(self) -> NDArray[np.float64]:
        """The fitted direction [E]."""
        mean = self._x / self._n
        covariance = self._xx / self._n - np.outer(mean, mean)
        right = self._xy / self._n - mean * (self._y / self._n)
        spread = np.maximum(covariance.diagonal(), 1e-12)
        ridge = max(_RIDGE, len(mean) / self._n)
        result: NDArray[np.float64] = np.linalg.solve(covariance + np.diag(ridge * spread), right)
        return result


def learn_directions(
    model: Model,
    tokens: NDArray[np.int32],
    layers: Sequence[int],
    following: int,
    length: int,
    threads: int,
    progress: Callable[[int, int], None],
) -> dict[int, NDArray[np.float64]]:
    """The direction of each of these layers, from up to 64 pieces of a text.

    A piece is a prompt of `length` tokens and the `following` tokens. Raises InputError if the text is too short,
    HostError if llama.cpp's graph of this model does not show the states of its tokens.
    """
    size = length + following
    if len(tokens) < size:
        raise InputError(f"the text has {len(tokens)} tokens, at least {size} are needed; use a longer text")
    count = min(MAX_PIECES, len(tokens) // size)
    fits = {layer: Fit() for layer in layers}
    reader = _Reader(model, length)
    with options(prune="off"):  # the file's own pruning may come from another text
        context = model.context(
            size, n_ubatch=size, threads=threads, flash_attention="off", eval_callback=reader.on_node
        )
    with context:
        for i, start in enumerate(np.linspace(0, len(tokens) - size, count).astype(np.int64)):
            piece = tokens[start : start + size].copy()
            if model.add_bos:
                piece[0] = model.bos
            seen = reader.read(context, piece)
            missing = [layer for layer in layers if layer not in seen.states or layer + 1 not in seen.looks]
            if missing or any(later - 1 not in seen.outputs for later in seen.looks if later > min(layers)):
                raise _not_supported(model, "llama.cpp's graph does not show the states of its tokens")
            for layer, fit in fits.items():
                # The first token differs from all others, and is never dropped.
                fit.add(seen.states[layer][1:], worth_keeping(seen, layer)[1:])
            progress(i + 1, count)
    return {layer: fit.direction() for layer, fit in fits.items()}


def _not_supported(model: Model, reason: str) -> HostError:
    return HostError(
        f"{model.path}: the score 'learned' does not support this model ({reason}); choose another with --score"
    )


class _Reader:
    """Collects the tensors of `Seen` from a running model. The first run records where they are in its graph."""

    def __init__(self, model: Model, length: int) -> None:
        self._model, self._length, self._ggml = model, length, ggml()
        with open_model(model.path) as reader:
            self._shapes = {tensor.name: tensor.shape for tensor in reader.tensors.values()}
        self._recorder: Recorder | None = Recorder(self._shapes)
        self._wanted: dict[int, list[tuple[str, int]]] = {}  # place in the graph -> kinds and layers
        self._place = -1  # of the node that llama.cpp asked about last
        self._seen = Seen()
        self._failure: BaseException | None = None

    def read(self, context: Context, tokens: NDArray[np.int32]) -> Seen:
        """Runs a prompt and the tokens that follow it."""
        if self._recorder is not None:
            self._run(context, tokens)
            self._find(self._recorder)
            self._recorder = None
        self._seen = Seen()
        self._run(context, tokens)
        return self._seen

    def _run(self, context: Context, tokens: NDArray[np.int32]) -> None:
        self._place = -1
        context.clear()
        # Requests all logits; otherwise the last layer would skip tokens.
        context.decode(Batch(tokens, first_logits=0))
        if self._failure is not None:
            raise self._failure

    def _find(self, recorder: Recorder) -> None:
        try:
            found = layers_of(translate(recorder.take(), self._shapes))
        except Unsupported as e:
            raise _not_supported(self._model, str(e)) from e
        for number, layer in found.items():
            self._wanted.setdefault(layer.attention, []).append(("looks", number))
            self._wanted.setdefault(layer.after_attention, []).append(("states", number))
            if layer.before is not None:
                self._wanted.setdefault(layer.before, []).append(("outputs", number - 1))

    def on_node(self, address: int, ask: bool) -> bool:
        """Called by llama.cpp; no exception may pass through its C code."""
        if self._recorder is not None:
            return self._recorder.on_node(address, ask)
        try:
            if ask:
                self._place += 1
                return self._place in self._wanted
            values, n = self._ggml.floats(GgmlTensor.from_address(address)), self._length
            for kind, layer in self._wanted[self._place]:
                if kind == "looks":
                    paid = values[0, :, n:, :n]  # [heads, tokens after the prompt, tokens of the prompt]
                    self._seen.looks[layer] = np.square(paid).mean(0).sum(0)
                else:
                    kept = self._seen.states if kind == "states" else self._seen.outputs
                    kept[layer] = normalized(values[0, 0, :n])
            return True
        except BaseException as e:
            self._failure = e
            return False
