"""Trains norm weights and scales after quantization, so that the logits move back towards the float model's.

The student is the quantized model with rounded activations, the teacher is the float model. The loss is the divergence
that `evaluate` measures, on the calibration text. Codes, codebooks and everything else stay fixed. Part of the text is
held out, and the result is dropped unless it is better there. The trained parameters are factors near 1, because the
norm weights of one model differ by three powers of ten: a step size that suits one ruins another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from agq_gguf.graphs.llama import LlamaGraph
from agq_gguf.matrix.codebook import storable
from agq_gguf.matrix.quantize import QuantizedMatrix
from agq_gguf.matrix.simulate import Rounder, restored

_RATE = 5e-4  # learning rate of the factors
_WARM_UP = 0.1  # share of the steps
_HELD_OUT = 8  # one batch in so many is held out
_USUAL = 0.99  # share of the held-out positions, those with the least divergence, that decide


@dataclass(frozen=True)
class Tuned:
    """The result; with empty dictionaries if tuning did not help."""

    norms: dict[str, torch.Tensor]
    matrices: dict[str, QuantizedMatrix]
    before: float  # divergence in nats per token on the held-out text
    after: float


class _Student:
    """The quantized model with trainable norms and scales."""

    def __init__(
        self,
        graph: LlamaGraph,
        matrices: Mapping[str, QuantizedMatrix],
        norms: Mapping[str, torch.Tensor],
        embedding: torch.Tensor | None,
        output: torch.Tensor | None,
    ) -> None:
        self.graph, self.matrices, self.output = graph, matrices, output
        self.embedding = embedding
        self._biases = {name: bias for name, bias in norms.items() if name not in graph.norms}
        self._norms = {name: norms.get(name, graph.tensor(name)) for name in graph.norms}
        self._scales = {name: torch.from_numpy(m.matrix.scales) for name, m in matrices.items()}
        self._norm_factors = {name: torch.ones_like(norm) for name, norm in self._norms.items()}
        self._scale_factors = {name: torch.ones_like(scales) for name, scales in self._scales.items()}
        self._rounders = {name: Rounder(m.matrix.parameters, m.matrix.codes.shape[1]) for name, m in matrices.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The trained parameters."""
        found = [*self._norm_factors.values(), *self._scale_factors.values()]
        return [factor.requires_grad_() for factor in found]

    def norms(self) -> dict[str, torch.Tensor]:
        """Current weights of norms, and biases that differ from the file's."""
        return self._biases | {name: norm * self._norm_factors[name] for name, norm in self._norms.items()}

    def scales(self, name: str) -> torch.Tensor:
        """Scales [M, K / 64] of a matrix, rounded as the file stores them; gradients ignore the rounding."""
        exact = self._scales[name] * self._scale_factors[name]
        return exact + (storable(exact.detach()) - exact.detach())

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        key = f"{name}.weight"
        if key not in self.matrices:
            return self.graph.linear(name, x)
        rounder = self._rounders[key]
        return functional.linear(rounder(x), restored(self.matrices[key].matrix, rounder, self.scales(key)))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits with the norms of the student."""
        with self.graph.replacing(self.norms()):
            x = self.graph.embed(tokens, self.embedding)
            for layer in range(self.graph.shape.n_layer):
                x = self.graph.block(layer, x, self._linear)
            return self.graph.logits(x, self.output)


def bytes_needed(n_parameters: int) -> int:
    """Memory that tuning needs, roughly: each restored weight, its gradient, and its codes as indices."""
    return 16 * n_parameters


def tune(
    graph: LlamaGraph,
    batches: list[torch.Tensor],
    matrices: Mapping[str, QuantizedMatrix],
    norms: Mapping[str, torch.Tensor],
    *,
    embedding: torch.Tensor | None,
    output: torch.Tensor | None,
    epochs: int,
    progress: Callable[[int, int], None],
) -> Tuned:
    """Trains on `batches` of tokens [batch, tokens].

    `norms` (those that differ from the file's), `embedding` and `output` belong to the quantized model.
    """
    student = _Student(graph, matrices, norms, embedding, output)
    kept = set(range(min(_HELD_OUT // 2, len(batches) - 1), len(batches), _HELD_OUT))
    aside = [batches[i] for i in kept]
    seen = [batch for i, batch in enumerate(batches) if i not in kept]
    if not seen:
        return Tuned({}, {}, 0.0, 0.0)
    with torch.no_grad():
        before = _divergence(graph, student, aside)
    optimizer = torch.optim.Adam(student.parameters, lr=_RATE, betas=(0.9, 0.95))
    steps, step = epochs * len(seen), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(seen), generator=generator).tolist():
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 - step / steps)
            optimizer.zero_grad()
            _loss(graph, student, seen[i]).mean().backward()
            optimizer.step()
            step += 1
            progress(step, steps)
    with torch.no_grad():
        after = _divergence(graph, student, aside)
    # A few positions hold a third of the divergence. Where they fall is luck, so they must not decide.
    usual = (before + after).argsort()[: int(_USUAL * len(before)) or 1]
    if not after[usual].mean() < before[usual].mean():
        return Tuned({}, {}, float(before.mean()), float(after.mean()))
    with torch.no_grad():
        tuned = {
            name: replace(m, matrix=replace(m.matrix, scales=storable(student.scales(name)).numpy()))
            for name, m in matrices.items()
        }
        return Tuned(student.norms(), tuned, float(before.mean()), float(after.mean()))


def _loss(graph: LlamaGraph, student: _Student, tokens: torch.Tensor) -> torch.Tensor:
    """KL(float || student) of each position, in nats."""
    with torch.no_grad():
        x = graph.embed(tokens)
        for layer in range(graph.shape.n_layer):
            x = graph.block(layer, x, graph.linear)
        wanted = functional.log_softmax(graph.logits(x), -1)
    found = functional.log_softmax(student.logits(tokens), -1)
    return (wanted.exp() * (wanted - found)).sum(-1)


def _divergence(graph: LlamaGraph, student: _Student, batches: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([_loss(graph, student, batch).flatten() for batch in batches])
