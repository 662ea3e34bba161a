"""Results of token pruning for the last prompt: importance by layer, and which pieces of text were dropped.

`agq_gguf.options` sets how contexts prune; see `runtime/plugin.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.runtime.plugin import last_pruned, registered_library


def last_importance(layer: int) -> NDArray[np.float32]:
    """Importance [T] of the tokens of this thread's last pruned call (ubatch), at one of its pruning layers.

    NaN: the token was dropped at an earlier layer; infinite: it was protected. Empty if the layer is not a pruning
    layer.
    """
    with registered_library() as library:
        n = library.agq_last_importance(layer, None, 0)
        values = np.full(n, np.nan, np.float32)
        library.agq_last_importance(layer, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), n)
        return values


def last_head_weights(layer: int, head: int) -> NDArray[np.float32]:
    """The largest attention [T] that a head gave each token of this thread's last pruned call (ubatch).

    The queries are the last 16 tokens. NaN: the token was dropped at an earlier layer. Empty if the setting of the call
    did not name the head.
    """
    with registered_library() as library:
        n = library.agq_last_head_weights(layer, head, None, 0)
        values = np.full(n, np.nan, np.float32)
        library.agq_last_head_weights(layer, head, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), n)
        return values


def read_prompt(llama: Any, tokens: list[int]) -> tuple[list[tuple[str, int]], NDArray[np.int32]]:
    """Reads a prompt with a `llama_cpp.Llama`, which keeps it in its cache, and returns which tokens were dropped.

    Returns pieces of text with the layer after which their tokens were dropped (-1: kept), and the same layer for each
    token. Raises HostError or InputError if llama.cpp cannot read the prompt.
    """
    from agq_gguf.runtime.log import llama_errors

    with llama_errors("the prompt cannot be read"):
        for begin in range(0, len(tokens), llama.n_batch):
            llama.eval(tokens[begin : begin + llama.n_batch])
        return pieces_of(tokens, lambda part: llama.detokenize(part, special=True).decode("utf-8", "replace"))


def pieces_of(
    tokens: Sequence[int], detokenize: Callable[[Sequence[int]], str]
) -> tuple[list[tuple[str, int]], NDArray[np.int32]]:
    """What `read_prompt` returns, for a prompt that this thread has read last."""
    left = np.full(len(tokens), -1, np.int32)
    known = last_pruned()[: len(tokens)]
    left[: len(known)] = known
    borders = [0, *(np.flatnonzero(np.diff(left)) + 1).tolist(), len(tokens)]
    return [(detokenize(tokens[a:b]), int(left[a])) for a, b in pairwise(borders) if a < b], left
