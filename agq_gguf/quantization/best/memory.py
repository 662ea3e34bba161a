"""How `best` divides `--memory`, and how much of it a run will take."""

from __future__ import annotations

from collections.abc import Sequence

from agq_gguf.gguf_io.tensor_names import EMBEDDING
from agq_gguf.quantization.best import tune
from agq_gguf.quantization.type_plan import TensorPlan

_BATCH_TOKENS = 2048  # run through the graph at one time, or fewer where its values are large
_COPIES = 5  # of the largest value, most often the logits, while gradients are computed
_STREAMS = 2  # the float model's and the quantized model's


def for_weights(memory: int) -> int:
    """Bytes for float weights that are kept from one use to the next."""
    return memory // 4


def for_grams(memory: int) -> int:
    """Bytes for E[g g^T] of gradients with respect to outputs."""
    return memory // 4


def chunks_at_once(memory: int, chunk: int, largest: int) -> int:
    """How many chunks of `chunk` tokens run through the graph at one time.

    `largest` is how many numbers the largest value has.
    """
    return max(1, min(_BATCH_TOKENS // chunk, memory // 4 // (_COPIES * 4 * max(1, largest))))


def chunks_of_text(memory: int, alive: int) -> int:
    """For how many chunks both streams fit; `alive` is how many numbers a stream keeps of each."""
    return max(1, memory // 2 // max(1, _STREAMS * 4 * alive))


def for_feedback(memory: int) -> int:
    """Bytes for matrices that are rounded at one time."""
    return memory // 8


def needed(plans: Sequence[TensorPlan], memory: int, *, tokens: int, chunk: int, tunes: bool) -> int:
    """What a run will take at its peak, roughly, without the program itself: of models with a residual stream."""
    sizes = {plan.source.name: plan.source for plan in plans}
    ours = [plan.source for plan in plans if plan.searched]
    vocabulary, width = sizes[EMBEDDING].shape if EMBEDDING in sizes else (0, 0)
    numbers = sum(tensor.n_elements for tensor in sizes.values())
    weights = min(4 * numbers, for_weights(memory))
    grams = min(sum(4 * tensor.shape[0] ** 2 for tensor in ours if len(tensor.shape) == 2), for_grams(memory))
    alive = chunk * (width + max((tensor.shape[-1] for tensor in ours), default=0))
    chunks = min(-(-tokens // chunk), chunks_of_text(memory, alive))
    streams = _STREAMS * 4 * alive * chunks
    at_once = min(chunks, chunks_at_once(memory, chunk, chunk * vocabulary))
    gradients = _COPIES * 4 * chunk * vocabulary * at_once
    tuning = tune.bytes_needed(numbers, chunk * vocabulary)
    stages = grams + max(weights + gradients, streams + for_feedback(memory))
    return max(stages, weights + tuning if tunes and tuning <= memory else 0)
