"""Which layers of a model see only a sliding window of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agq_gguf.gguf_io.reader import Reader
from agq_gguf.runtime.model import Batch, Model
from agq_gguf.runtime.plugin import options
from agq_gguf.runtime.pruned import last_head_weights

_BEYOND = 64  # so many tokens longer than the window is the prompt; 16 of them look back
_FIRST = 16  # tokens at its beginning, which no window shows


def window_of(reader: Reader) -> int:
    """The size of the model's sliding window in tokens; 0 if its metadata name none."""
    size = reader.get(f"{reader.architecture}.attention.sliding_window", 0)
    return int(size) if isinstance(size, int | np.integer) else 0


def windowed_layers(model: Model, layers: Sequence[int], window: int, threads: int) -> frozenset[int]:
    """Those of `layers` (0, 1, ... in order) whose heads see nothing outside a window of this size.

    The metadata do not say which layers these are, so a prompt that is longer than the window is read. Empty if no
    prompt of the model's length is longer, or if the plugin cannot look at its heads.
    """
    n = window + _BEYOND
    if window == 0 or n > model.n_ctx_train:
        return frozenset()
    prompt = np.arange(n, dtype=np.int32) % (model.n_vocab // 2) + model.n_vocab // 4
    probing = ",".join(f"{layer}:t0" for layer in layers) + ";score=heads;heads=all"
    with options(prune=probing):
        context = model.context(n, n_batch=n, n_ubatch=n, threads=threads)
    with context:
        context.decode(Batch(prompt))
        return frozenset(layer for layer in layers if _is_blind(layer, n))


def _is_blind(layer: int, tokens: int) -> bool:
    """Whether the last tokens of the latest prompt pay no attention to its beginning, in any head of the layer."""
    head = 0
    while len(weights := last_head_weights(layer, head)) == tokens:
        if weights[:_FIRST].any():
            return False
        head += 1
    return head > 0
