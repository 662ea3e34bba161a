"""Tunes what costs no bits: after quantization, norm weights and scales learn to bring the logits back.

The quantized model, activations rounded, is the student, the float model the teacher; the loss is the divergence that
`evaluate` measures, the data the calibration text. Codes, codebooks and all else stay. Part of the text is kept aside,
and the result is thrown away unless it is better there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from agq_gguf.codebook import storable
from agq_gguf.llama_graph import LlamaGraph
from agq_gguf.quantizer import QuantizedMatrix
from agq_gguf.simulate import Rounder, restored

_NORM_RATE = 1e-3
_SCALE_RATE = 1e-3  # as a share of the matrix's mean scale
_WARM_UP = 0.1  # share of the steps
_HELD_OUT = 8  # one batch in so many is kept aside


@dataclass(frozen=True)
class Tuned:
    """What came out of it; empty dictionaries where it was not better."""

    norms: dict[str, torch.Tensor]
    matrices: dict[str, QuantizedMatrix]
    before: float  # divergence in nats per token on the text kept aside
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
    ):
        self.graph, self.matrices, self.output = graph, matrices, output
        self.embedding = graph.tensor("token_embd.weight") if embedding is None else embedding
        self.norms = {name: norms.get(name, graph.tensor(name)).clone().requires_grad_() for name in graph.norms}
        self.scales = {name: torch.from_numpy(m.matrix.scales).clone() for name, m in matrices.items()}
        for scales in self.scales.values():
            scales.requires_grad_()
        self._rounders = {name: Rounder(m.matrix.parameters, m.matrix.codes.shape[1]) for name, m in matrices.items()}

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        key = f"{name}.weight"
        if key not in self.matrices:
            return self.graph.linear(name, x)
        scales, rounder = self.scales[key], self._rounders[key]
        stored = scales + (storable(scales.detach()) - scales.detach())  # as the file has them; gradients pass
        return functional.linear(rounder(x), restored(self.matrices[key].matrix, rounder, stored))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits with the norms of the student."""
        self.graph.replaced = self.norms
        try:
            x = self.embedding[tokens]
            for layer in range(self.graph.shape.n_layer):
                x = self.graph.block(layer, x, self._linear)
            return self.graph.logits(x, self.output)
        finally:
            self.graph.replaced = {}


def bytes_needed(n_parameters: int) -> int:
    """Memory that tuning takes, roughly: each weight restored, its gradient, and its codes as indices."""
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

    `norms` (where they are not the file's), `embedding` and `output` are what the quantized model has.
    """
    student = _Student(graph, matrices, norms, embedding, output)
    kept = set(range(min(_HELD_OUT // 2, len(batches) - 1), len(batches), _HELD_OUT))
    aside = [batches[i] for i in kept]
    seen = [batch for i, batch in enumerate(batches) if i not in kept]
    if not seen:
        return Tuned({}, {}, 0.0, 0.0)
    with torch.no_grad():
        before = _divergence(graph, student, aside)
    groups = [{"params": list(student.norms.values()), "lr": _NORM_RATE, "peak": _NORM_RATE}]
    for scales in student.scales.values():
        peak = _SCALE_RATE * float(scales.detach().abs().mean())
        groups.append({"params": [scales], "lr": peak, "peak": peak})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    steps, step = epochs * len(seen), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(seen), generator=generator).tolist():
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 - step / steps)
            optimizer.zero_grad()
            _loss(graph, student, seen[i]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            progress(step, steps)
    with torch.no_grad():
        after = _divergence(graph, student, aside)
    if not after < before:
        return Tuned({}, {}, before, after)
    tuned = {
        name: replace(m, matrix=replace(m.matrix, scales=storable(student.scales[name].detach()).numpy()))
        for name, m in matrices.items()
    }
    return Tuned({name: norm.detach() for name, norm in student.norms.items()}, tuned, before, after)


def _loss(graph: LlamaGraph, student: _Student, tokens: torch.Tensor) -> torch.Tensor:
    """KL(float || student), nats per token."""
    with torch.no_grad():
        x = graph.embed(tokens)
        for layer in range(graph.shape.n_layer):
            x = graph.block(layer, x, graph.linear)
        wanted = functional.log_softmax(graph.logits(x), -1)
    found = functional.log_softmax(student.logits(tokens), -1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def _divergence(graph: LlamaGraph, student: _Student, batches: list[torch.Tensor]) -> float:
    counts = [batch.numel() for batch in batches]
    total = sum(float(_loss(graph, student, batch)) * n for batch, n in zip(batches, counts, strict=True))
    return total / sum(counts)
