"""What a run of `quantize` will need: time, memory and disk, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agq_gguf.calibration.memory import hessian_bytes, hessians_that_fit, work_bytes
from agq_gguf.gguf_io.tensor_names import layer_of
from agq_gguf.gguf_io.writer import layout
from agq_gguf.quantization.best import memory as best
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.type_plan import TensorPlan

_PROGRAM = 400 << 20  # bytes: Python, PyTorch and llama.cpp without a model
_COPIES = 3  # of a matrix in float32 while it is quantized
_CHUNK = 512  # tokens of the text that llama.cpp runs at a time
_LOGITS = 2 * 4 * _CHUNK  # bytes for each word of the vocabulary: logits of a chunk, in the graph and for the caller

# Seconds = operations / speed of a product, with factors measured on SmolLM2 135M (2-core Xeon at 2.5 GHz, Zen 4).
_FORWARD = 2.0  # llama.cpp's products of float weights are slower than PyTorch's: 3 times on the Xeon, 1.5 on the Zen 4
_PER_WEIGHT = 2e-7  # seconds of one core for the search of scales and codes of a weight
_BEST = 6.0  # `best` takes so many times the time of `balanced`


@dataclass(frozen=True)
class Estimate:
    """What a run will need, roughly."""

    seconds: float
    memory_bytes: int  # resident memory at its peak, without the pages of the source file that the system may drop
    disk_bytes: int


def estimate(plans: Sequence[TensorPlan], options: QuantizeOptions, *, calibrated: bool, threads: int) -> Estimate:
    """What quantizing by these plans will need. `calibrated`: with a text; `threads` is how many it may use."""
    placed = layout((plan.source.name, plan.type_name, plan.source.shape) for plan in plans)
    disk = sum(target.n_bytes for target in placed)
    ours = [plan.source for plan in plans if plan.searched]
    feedback = calibrated and options.matrix.error_feedback
    statistics, passes = _statistics(plans, options.memory) if feedback else (0, 1)
    largest = max((4 * tensor.n_elements // tensor.n_matrices for tensor in ours), default=0)
    vocabulary = next((plan.source.shape[0] for plan in plans if plan.source.name == "token_embd.weight"), 0)
    running = _LOGITS * vocabulary if calibrated else 0
    memory = _PROGRAM + max(statistics, 0) + running + _COPIES * largest
    weights = sum(plan.source.n_elements for plan in plans)
    tokens = options.tokens_for(weights)
    if options.quality == "best" and calibrated:
        of_best = best.needed(plans, options.memory, tokens=tokens, chunk=options.context, tunes=options.tune)
        memory = max(memory, _PROGRAM + of_best)
    speed = max(threads, 1) * _operations_per_second()
    seconds = _PER_WEIGHT * sum(tensor.n_elements for tensor in ours) / max(threads, 1)
    if calibrated:
        seconds += _FORWARD * passes * 2 * tokens * weights / speed
    if feedback:
        inputs = {(layer_of(tensor.name), tensor.shape[-1]): tensor.n_matrices for tensor in ours}
        for (_, columns), experts in inputs.items():
            if count := hessians_that_fit(columns, experts, options.memory):
                seconds += (2 * tokens * columns**2 + count * columns**3) / speed
        sweeps = 1 + 2 * options.matrix.sweeps
        seconds += sum(sweeps * tensor.n_elements * tensor.shape[-1] for tensor in ours) / speed
    return Estimate(seconds * (_BEST if options.quality == "best" else 1), memory, disk)


def _statistics(plans: Sequence[TensorPlan], memory: int) -> tuple[int, int]:
    """Bytes of statistics at one time, and how often the text is run."""
    inputs = {(layer_of(p.source.name), p.source.shape[-1]): p.source.n_matrices for p in plans if p.searched}
    total = most = 0
    for (_, columns), experts in inputs.items():
        if count := hessians_that_fit(columns, experts, memory):
            total += count * hessian_bytes(columns)
            most = max(most, work_bytes(columns))
    passes = max(1, -(-total // max(memory - most, 1)))
    return min(total + most, memory), passes


def _operations_per_second() -> float:
    """Multiplications and additions of one core in a large product of PyTorch: the fastest of a tenth of a second.

    Not their mean, and not of several threads, which wait for each other: both fall to a fraction whenever another
    process has a core for a moment.
    """
    a, before = torch.ones(384, 384), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end, fastest = time.perf_counter() + 0.1, float("inf")
        while time.perf_counter() < end:
            begin = time.perf_counter()
            a @ a
            fastest = min(fastest, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * 384**3 / fastest
