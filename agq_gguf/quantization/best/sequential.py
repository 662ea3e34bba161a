"""Quantizes a model stage by stage, each with the inputs that the already quantized stages really produce.

Two streams of the calibration text run through the graph side by side: x in the float model, and x^ in the model whose
earlier stages are quantized, with rounded activations. A matrix W should give W x when its input is x^. The best linear
solution is W + W T with T = E[(x - x^) x^^T] E[x^ x^^T]^-1: it compensates for the predictable part of the earlier
errors. It is rounded with error feedback on E[x^ x^^T]. (arXiv 2504.09629 has the same correction.) Products are
computed once per stream, so this needs two passes through the model, and as many Hessians as without the correction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from agq_gguf.calibration.sampling import spread
from agq_gguf.calibration.stats import InputStats
from agq_gguf.format.blocks import Matrix, listable
from agq_gguf.graphs.llama import LlamaGraph, State
from agq_gguf.matrix import equalize
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.matrix.quantize import QuantizedMatrix, prepare_input, quantize_matrix
from agq_gguf.matrix.simulate import Rounder, restored
from agq_gguf.quantization.best.fisher import Sensitivity
from agq_gguf.quantization.resume import Journal

Finish = Callable[[str, QuantizedMatrix], None]  # called with a name and a finished matrix

_SAMPLE_ROWS = 256
_NORMS = ("attn_norm", "", "ffn_norm", "")  # the norm that produces the input of a stage
_RIDGE = 0.03  # added to the Hessian in T, as a share of its mean diagonal
# T is learned from the calibration text. Half of it measured as well as all of it, and errs less on other text.
_TAKEN_BACK = 0.5


class Sequential:
    """One run over a model.

    `batches` hold tokens [batch, tokens] int64. `wanted` are the names of the weights to quantize; all other matrices
    stay float. `embedding` [vocabulary, n_embd] is the token embedding of the quantized model.
    """

    def __init__(
        self,
        graph: LlamaGraph,
        batches: list[torch.Tensor],
        wanted: set[str],
        sensitivity: Sensitivity,
        options: MatrixOptions,
        embedding: torch.Tensor | None = None,
    ) -> None:
        self._graph, self._wanted, self._sensitivity, self._options = graph, wanted, sensitivity, options
        self._row_factors: dict[str, torch.Tensor] = {}  # factors by which rows of matrices were multiplied
        self._norms: dict[str, torch.Tensor] = {}  # equalized
        self._float: list[State] = [(graph.embed(tokens), None) for tokens in batches]
        self._rounded: list[State] = [(graph.embed(tokens, embedding), None) for tokens in batches]

    @torch.no_grad()
    def run(self, journal: Journal, progress: Callable[[int, str], None], finish: Finish) -> dict[str, torch.Tensor]:
        """Quantizes every wanted weight of the layers in the order of the graph; returns the norms that changed.

        Calls `finish` with each finished matrix and `progress` with the number of stages done and a name. `journal`
        holds the matrices of an earlier run and receives new ones.
        """
        for layer in range(self._graph.shape.n_layer):
            with self._graph.replacing(self._levelled(layer) if self._options.equalize else {}):
                for stage, names in enumerate(self._graph.stages):
                    progress(layer * len(self._graph.stages) + stage, f"blk.{layer}.{names[0]}.weight")
                    self._stage(layer, stage, journal, finish)
        return self._norms

    def _take_gram(self, name: str) -> torch.Tensor | None:
        """G of a matrix, adapted if its rows were levelled. It is large and needed once, so it is removed here."""
        gram, factors = self._sensitivity.grams.pop(name, None), self._row_factors.get(name)
        return gram if gram is None or factors is None else gram / factors / factors[:, None]

    def _levelled(self, layer: int) -> dict[str, torch.Tensor]:
        """The matrices of a block after levelling: columns of two of them get the same size, and the function stays.

        A channel between up and down, or between v and the attention output, may be multiplied by any factor if the
        columns of the next matrix are divided by it. Each row has its own scales, but a group of columns shares one, so
        columns of equal size lose less in rounding.
        """
        found: dict[str, torch.Tensor] = {}
        for front, behind in self._graph.levelled:
            names = [f"blk.{layer}.{name}.weight" for name in (front, behind)]
            if not self._wanted.issuperset(names) or self._graph.has(f"blk.{layer}.{front}.bias"):
                continue
            rows, columns = (self._graph.tensor(name) for name in names)
            source = torch.arange(columns.shape[1])  # the row that produces a column's input
            if front == "attn_v":
                shape, head = self._graph.shape, len(rows) // self._graph.shape.n_kv
                source = source // head // (shape.n_head // shape.n_kv) * head + source % head
            square = torch.zeros(len(rows)).index_add_(0, source, columns.square().mean(0))
            factors = equalize.level(square)
            found |= {names[0]: rows * factors[:, None], names[1]: columns / factors[source]}
            self._row_factors[f"blk.{layer}.{front}"] = factors
        return found

    def _stage(self, layer: int, stage: int, journal: Journal, finish: Finish) -> None:
        graph = self._graph
        names = [f"blk.{layer}.{name}" for name in graph.stages[stage]]
        float_in = [graph.stage_input(layer, stage, state) for state in self._float]
        rounded_in = [graph.stage_input(layer, stage, state) for state in self._rounded]
        weights = {name: graph.tensor(f"{name}.weight") for name in names}
        wanted = [name for name in names if f"{name}.weight" in self._wanted]
        norm = f"blk.{layer}.{_NORMS[stage]}.weight"
        if self._options.equalize and len(wanted) == len(names) and norm in graph.norms:
            factors = self._factors(rounded_in, [weight.numpy() for weight in weights.values()])
            if factors is not None:
                bias = norm.removesuffix("weight") + "bias"
                self._norms |= {name: graph.tensor(name) / factors for name in (norm, bias) if graph.has(name)}
                weights = {name: weight * factors for name, weight in weights.items()}
                float_in, rounded_in = ([x / factors for x in inputs] for inputs in (float_in, rounded_in))
        done = {name: result for name in wanted if (result := journal.get_matrix(f"refined {name}")) is not None}
        if len(done) < len(wanted):
            stats, correction = self._gather(float_in, rounded_in, self._sensitivity.weights(layer, stage))
            capacity = min(listable(*weights[name].shape) for name in wanted)
            prepared = prepare_input(stats, stats.columns, capacity, self._options)
            for name in wanted:
                if name not in done:
                    target = weights[name] + weights[name] @ correction
                    done[name] = quantize_matrix(
                        target.numpy(), prepared, self._options, f"{name}.weight", self._take_gram(name)
                    )
                    journal.put_matrix(f"refined {name}", done[name])
        self._float = [
            graph.stage_output(layer, stage, state, [functional.linear(x, weights[name]) for name in names])
            for state, x in zip(self._float, float_in, strict=True)
        ]
        apply = {name: _Applied(done[name].matrix) for name in wanted}
        self._rounded = [
            graph.stage_output(
                layer,
                stage,
                state,
                [apply[name](x) if name in apply else functional.linear(x, weights[name]) for name in names],
            )
            for state, x in zip(self._rounded, rounded_in, strict=True)
        ]
        for name in wanted:
            finish(f"{name}.weight", done[name])

    def _factors(self, inputs: list[torch.Tensor], weights: list[np.ndarray]) -> torch.Tensor | None:
        """The factors that equalization moves from the norm into the matrices; None if it does not help."""
        columns, options = inputs[0].shape[-1], self._options
        tokens = sum(x.shape[0] * x.shape[1] for x in inputs)
        square = torch.stack([x.flatten(0, 1).square().sum(0) for x in inputs]).sum(0) / tokens
        stats = InputStats(tokens, square.numpy(), None, _sample(inputs).numpy())
        capacity = min(listable(len(weight), columns) for weight in weights)
        found = equalize.choose(
            stats, weights, capacity, options.activation_bits, options.activation_scale, options.refine
        )
        return None if found is None else torch.from_numpy(found)

    def _gather(
        self, float_in: list[torch.Tensor], rounded_in: list[torch.Tensor], weights: torch.Tensor | None
    ) -> tuple[InputStats, torch.Tensor]:
        """Statistics of x^ with a Hessian weighted by token, and the correction T [K, K]."""
        columns = rounded_in[0].shape[-1]
        hessian, cross = torch.zeros(columns, columns), torch.zeros(columns, columns)
        largest = torch.zeros(columns)
        tokens = sum(x.shape[0] * x.shape[1] for x in rounded_in)
        begin = 0
        for x, rounded in zip(float_in, rounded_in, strict=True):
            flat = rounded.flatten(0, 1)
            weighted = flat if weights is None else flat * weights[begin : begin + len(flat), None]
            hessian.addmm_(weighted.T, flat)
            cross.addmm_((x.flatten(0, 1) - flat).T, weighted)
            largest = torch.maximum(largest, flat.abs().amax(0))
            begin += len(flat)
        hessian /= tokens
        damped = hessian.clone()
        damped.diagonal().add_(_RIDGE * float(hessian.diagonal().mean()) + torch.finfo(torch.float32).tiny)
        correction = torch.linalg.solve(damped, cross.T / tokens).T * _TAKEN_BACK
        stats = InputStats(
            tokens,
            hessian.diagonal().numpy().copy(),
            largest.numpy(),
            _sample(rounded_in).numpy(),
            hessian.numpy(),
        )
        return stats, correction


def _sample(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Some tokens [n, K] of inputs [batch, tokens, K], spread evenly over all places of a text."""
    places = torch.from_numpy(spread(_SAMPLE_ROWS, sum(x.shape[0] * x.shape[1] for x in inputs)))
    found, begin = [], 0
    for x in inputs:
        flat = x.flatten(0, 1)
        found.append(flat[places[(places >= begin) & (places < begin + len(flat))] - begin])
        begin += len(flat)
    return torch.cat(found)


class _Applied:
    """A quantized matrix as the runtime applies it."""

    def __init__(self, matrix: Matrix) -> None:
        self._round = Rounder(matrix.parameters, matrix.codes.shape[1])
        self._weight = restored(matrix, self._round)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self._round(x), self._weight)
