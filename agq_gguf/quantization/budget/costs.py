"""Estimates the loss, in nats per token, from storing one tensor in a coarser type.

If the graph runs in PyTorch (`graphs`), the cost is the divergence to second order, E[(g . dy)^2] / 2. Here dy is the
change of the product when the tensor and its input are rounded, and g is the gradient of -log p of a token drawn from
the model's own prediction. Inputs count because types differ: those of q5_K and q6_K share a scale over 256 channels,
which outliers ruin. Tensors are rounded one at a time, without error feedback, which would help most about equally.

Otherwise the cost is the relative squared error of the product. All blocks then have the same weight, and the output
matrix has the weight of all blocks together. This is close to what was measured where gradients are known
(docs/research/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from agq_gguf.calibration.stats import InputStats
from agq_gguf.format.blocks import TYPE_NAME, listable
from agq_gguf.format.reference import dequantize
from agq_gguf.gguf_io.reader import Reader, Tensor
from agq_gguf.gguf_io.tensor_names import layer_of
from agq_gguf.graphs.gradients import gradients
from agq_gguf.graphs.losses import drawn
from agq_gguf.graphs.run import Executor, Reading
from agq_gguf.graphs.segments import segments
from agq_gguf.matrix import stock_types
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import prepare_input, quantize_matrix
from agq_gguf.matrix.simulate import BlockRounder, Rounder

Damage = dict[str, dict[str, float]]  # tensor -> type -> cost
_ROWS = 1024  # rows of a matrix that are tried without gradients


@dataclass(frozen=True)
class Tried:
    """A matrix in a type, without error feedback."""

    weight: torch.Tensor  # [M, K] as the type holds it
    rounder: Callable[[torch.Tensor], torch.Tensor]  # rounds inputs [.., K] as the type's kernels do

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The product with rows x [.., K]."""
        return functional.linear(self.rounder(x), self.weight)


def tried(
    weight: NDArray[np.float32],
    type_name: str,
    stats: InputStats | None,
    options: MatrixOptions,
    name: str = "the matrix",
    device: str | torch.device = "cpu",
) -> Tried:
    """A matrix [M, K] in a type."""
    if type_name != TYPE_NAME:
        restored = stock_types.rounded(weight, type_name, None if stats is None else stats.mean_square)
        return Tried(torch.from_numpy(restored).to(device), BlockRounder(stock_types.input_block(type_name)))
    plain = replace(options, error_feedback=False)
    prepared = prepare_input(stats, weight.shape[1], listable(*weight.shape), plain)
    matrix = quantize_matrix(weight, prepared, plain, name).matrix
    return Tried(torch.from_numpy(dequantize(matrix)).to(device), Rounder(matrix.parameters, weight.shape[1], device))


def by_gradients(
    run: Executor,
    tokens: torch.Tensor,
    types: Mapping[str, Iterable[str]],
    options: MatrixOptions,
    progress: Callable[[int, int, str], None],
    *,
    logits: bool = True,
) -> Damage:
    """Divergence on `tokens` [batch, n] int64 from rounding one tensor only, for each of its `types`.

    `logits` says what the graph's output is. A table that is looked up and multiplied costs the sum of both.
    """
    found: Damage = {}
    known: dict[str, InputStats] = {}  # of weights that were multiplied; a lookup of one gets the rows rounded for that

    def visit(place: Reading, gradient: torch.Tensor) -> None:
        name = place.weight
        if name not in types:
            return
        progress(len(found), len(types), name)
        weight = run.weight(name)
        if place.given is not None:
            known[name] = _stats(place.given.flatten(0, -2))
        kept = found.setdefault(name, {})
        with torch.no_grad():
            for type_name in types[name]:
                every = _tried(name, weight, type_name, known.get(name), options)
                cost = _cost(place, weight, every, gradient) / tokens.numel()
                kept[type_name] = kept.get(type_name, 0.0) + cost

    generator = torch.Generator().manual_seed(0)
    gradients(run, segments(run.graph), tokens, lambda y: drawn(y, logits, generator), visit)
    progress(len(types), len(types), "")
    return found


def _tried(
    name: str, weight: torch.Tensor, type_name: str, stats: InputStats | None, options: MatrixOptions
) -> list[Tried]:
    """A weight [rows, columns] or [experts, rows, columns] in a type, by expert."""
    matrices = weight.reshape(-1, *weight.shape[-2:]).cpu().numpy()
    return [tried(matrix, type_name, stats, options, name, weight.device) for matrix in matrices]


def _cost(place: Reading, weight: torch.Tensor, every: list[Tried], gradient: torch.Tensor) -> float:
    """Half of the sum of (g . dy)^2 over rows; of experts, the changes of a token count together."""
    if place.given is None:
        change = every[0].weight.reshape(weight.shape) - weight
        moved = (place.of(change) * gradient).sum(-1)
    else:
        made = place.by(lambda expert, x: every[expert].product(x))
        moved = ((made - place.of(weight)) * gradient).sum(-1)
        if place.ids is not None:
            moved = moved.sum(-1)
    return float(moved.square().sum()) / 2


def _stats(x: torch.Tensor) -> InputStats:
    """The statistics of an input [n, K] that the types need."""
    some = x[:: max(1, len(x) // 256)]
    return InputStats(len(x), x.square().mean(0).cpu().numpy(), None, some.cpu().numpy())


def by_errors(
    reader: Reader,
    output: str,
    stats: Mapping[str, InputStats],
    types: Mapping[str, Iterable[str]],
    options: MatrixOptions,
    progress: Callable[[int, int, str], None],
) -> Damage:
    """Relative errors of the products; `output` is the name of the matrix that yields the logits."""
    found: Damage = {}
    blocks = sum(layer_of(name) is not None for name in types)
    for name, wanted in types.items():
        progress(len(found), len(types), name)
        tensor, known = reader.tensors[name], stats.get(name)
        weight = reader.read(name, _some_rows(tensor))
        square = np.ones(tensor.shape[-1], np.float32) if known is None else known.mean_square
        energy = float((np.square(weight, dtype=np.float64) * square).sum())
        count = blocks if name == output else 1
        found[name] = {}
        for type_name in wanted:
            made = tried(weight, type_name, known, options, name)
            lost = float((np.square(made.weight.numpy() - weight, dtype=np.float64) * square).sum())
            if known is not None and known.sample is not None and len(known.sample):
                x = torch.from_numpy(known.sample)
                noise = functional.linear(made.rounder(x) - x, made.weight)
                lost += float(noise.square().sum(dtype=torch.float64)) / len(x)
            found[name][type_name] = count * lost / energy if energy > 0 else 0.0
    progress(len(types), len(types), "")
    return found


def _some_rows(tensor: Tensor) -> range:
    """The first rows, as many as AGQ4 supports in a matrix."""
    return range(min(_ROWS, tensor.shape[-2]))
