"""Learns from a text what the state of a token says about how much later layers and later tokens will miss it.

The model reads pieces of the text with nothing dropped, and llama.cpp calls back with the states and the attention of
each layer. A token is worth keeping if what follows a prompt looks at it in later layers, and if its state changes
much until then; else its keys and values can be made from the state in which it leaves. The logarithm of the product of
both is fitted by a linear function of the state (normalized by its root mean square): the direction of the score
`learned` of docs/pruning.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import HostError, InputError
from agq_gguf.runtime.ggml import GgmlTensor, ggml
from agq_gguf.runtime.model import Batch, Model
from agq_gguf.runtime.plugin import options

MAX_PIECES = 64  # of the text
_NODE = re.compile(r"(ffn_inp|l_out|kq_soft_max)-(\d+)")
_FLOOR = 1e-3  # of the mean: what is worth less counts as that much
_RIDGE = 1e-2  # at least; more if there are few tokens for the channels of a state


@dataclass
class Seen:
    """What the layers showed of the tokens of one prompt, the last layer's output aside."""

    states: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # behind the attention, normalized [T, E]
    outputs: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # behind the layer, normalized [T, E]
    looks: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # of the tokens behind the prompt, at each [T]


def normalized(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows with a root mean square of 1; zeros stay."""
    scale = np.sqrt(np.square(x, dtype=np.float64).mean(-1, keepdims=True))
    return (x / np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.float32)


def worth_keeping(seen: Seen, layer: int) -> NDArray[np.float64]:
    """What later layers would miss of each token that leaves behind the attention of this layer [T]."""
    worth = np.zeros(len(seen.states[layer]))
    for later, looks in seen.looks.items():
        if later > layer:
            change = np.square(seen.outputs[later - 1] - seen.states[layer], dtype=np.float64).mean(-1)
            worth += looks * change
    return worth


class Fit:
    """Least squares of the logarithm of `worth_keeping` on the state, from sums over tokens."""

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
        """The direction [E]."""
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
    """The direction of each of these layers, from up to 64 pieces of a text: prompts of `length`, and what follows.

    Raises InputError if the text is too short, HostError if llama.cpp does not show what is needed for this model.
    """
    size = length + following
    if len(tokens) < size:
        raise InputError(f"the text has {len(tokens)} tokens; at least {size} are needed")
    count = min(MAX_PIECES, len(tokens) // size)
    fits = {layer: Fit() for layer in layers}
    reader = _Reader(length)
    with options(prune="off"):  # what the file says may have been found for another text
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
                raise HostError(f"{model.path}: llama.cpp does not show the states of this model's tokens")
            for layer, fit in fits.items():
                # The first token is unlike all others, and always stays.
                fit.add(seen.states[layer][1:], worth_keeping(seen, layer)[1:])
            progress(i + 1, count)
    return {layer: fit.direction() for layer, fit in fits.items()}


class _Reader:
    """Takes the tensors of `Seen` out of a running model."""

    def __init__(self, length: int):
        self._length, self._ggml = length, ggml()
        self._seen = Seen()
        self._failure: BaseException | None = None

    def read(self, context: Any, tokens: NDArray[np.int32]) -> Seen:
        """Runs a prompt and what follows it."""
        self._seen = Seen()
        context.clear()
        # All logits are asked for: else the last layer would skip tokens.
        context.decode(Batch(tokens, first_logits=0))
        if self._failure is not None:
            raise self._failure
        return self._seen

    def on_node(self, address: int, ask: bool) -> bool:
        """What llama.cpp calls; no exception may pass through its C code."""
        try:
            node = GgmlTensor.from_address(address)
            found = _NODE.fullmatch(node.name.decode("utf-8", "surrogateescape"))
            if ask or not found:
                return bool(found) or not ask
            kind, layer, n = found[1], int(found[2]), self._length
            values = self._ggml.floats(node)
            if kind == "kq_soft_max":
                paid = values[0, :, n:, :n]  # [heads, tokens behind the prompt, tokens of the prompt]
                self._seen.looks[layer] = np.square(paid).mean(0).sum(0)
            else:
                kept = self._seen.states if kind == "ffn_inp" else self._seen.outputs
                kept[layer] = normalized(values[0, 0, :n])
            return True
        except BaseException as e:
            self._failure = e
            return False
