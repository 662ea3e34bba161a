"""What an error costs behind the place where it is made: the Fisher information of what the model computes.

A model's divergence from itself under small changes is a quadratic form, E[(g . dy)^2] / 2, where dy is the change of
a matrix's product and g the gradient of -log p(token), the token drawn from the model's own prediction. Where the next
word is certain g is next to nothing, and an error there costs nothing; so |g|^2 says how much a token's input should
weigh in the Hessian of that matrix (that the Hessian should see the loss behind the layer: arXiv 2505.07004; here in
its simplest form, one weight per token and input). And E[g g^T] says which errors of its outputs cancel
(`row_feedback`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.graphs.gradients import block_gradients, logits_gradient
from agq_gguf.graphs.llama import LlamaGraph
from agq_gguf.quantization.resume import Journal

# |g|^2 is heavy-tailed. Keys and values need it as it is: for them the first token of a text, on which attention rests,
# matters hundreds of times as much as others (with |g| its values lose 1.5 times as much on SmolLM2). A share of plain
# counting keeps the Hessian from resting on a few hundred tokens. Elsewhere |g| is better on text not seen, by 2%.
_SHARE = 0.8
_ATTENTION_INPUT = 0  # stage
_KEPT_BATCHES = 8  # so many at most are run again if a run is interrupted


@dataclass
class Sensitivity:
    """Sums over `batches` of the text."""

    batches: int = 0
    tokens: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)  # |g|^2 of each, by layer and stage
    grams: dict[str, torch.Tensor] = field(default_factory=dict)  # sum of g g^T [M, M], by matrix without ".weight"

    def weights(self, layer: int, stage: int) -> torch.Tensor | None:
        """How much each token counts in the inputs of a stage: [tokens] float32 of mean 1. None: all alike."""
        parts = self.tokens.get((layer, stage))
        return None if parts is None else _tempered(torch.cat(parts), stage)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """For a journal."""
        tokens = {f"tokens {layer} {stage}": torch.cat(parts).numpy() for (layer, stage), parts in self.tokens.items()}
        return {"batches": np.array(self.batches), **tokens, **{f"gram {n}": g.numpy() for n, g in self.grams.items()}}

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]]) -> Sensitivity:
        """From `arrays`."""
        found = cls(int(arrays["batches"]))
        for key, value in arrays.items():
            kind, _, rest = key.partition(" ")
            if kind == "tokens":
                layer, stage = map(int, rest.split())
                found.tokens[layer, stage] = [torch.from_numpy(value)]
            elif kind == "gram":
                found.grams[rest] = torch.from_numpy(value)
        return found


def measure(
    graph: LlamaGraph,
    batches: list[torch.Tensor],
    names: set[str],
    journal: Journal,
    progress: Callable[[int], None],
    seed: int = 0,
) -> Sensitivity:
    """Runs `batches`, tokens [batch, tokens] int64, forward and back: about three times the work of running the text.

    `names` are those of the matrices whose G is wanted. `journal` has what an earlier run has found, and gets more.
    """
    kept = journal.get("sensitivity")
    found = Sensitivity() if kept is None else Sensitivity.of(kept)
    done = sum(tokens.numel() for tokens in batches[: found.batches])
    for i in range(found.batches, len(batches)):
        progress(done)
        _add(graph, batches[i], names, found, torch.Generator().manual_seed(seed + i))
        done += batches[i].numel()
        if found.batches % _KEPT_BATCHES == 0 or found.batches == len(batches):
            journal.put("sensitivity", found.arrays())
    progress(done)
    return found


def affordable(rows: dict[str, int], memory: int) -> set[str]:
    """Those of the matrices, of so many rows each, whose G all find room together; small ones first."""
    found, left = set(), memory
    for name, n in sorted(rows.items(), key=lambda item: item[1]):
        left -= 4 * n * n
        if left >= 0:
            found.add(name)
    return found


def _add(
    graph: LlamaGraph, tokens: torch.Tensor, names: set[str], found: Sensitivity, generator: torch.Generator
) -> None:
    inputs = [graph.embed(tokens)]
    with torch.no_grad():
        for layer in range(graph.shape.n_layer):
            inputs.append(graph.block(layer, inputs[-1], graph.linear))
    gradient, _ = logits_gradient(graph, inputs.pop(), generator)
    for layer in reversed(range(graph.shape.n_layer)):
        gradient, products = block_gradients(graph, layer, inputs.pop(), gradient)
        for stage in range(len(graph.stages)):  # matrices and channels of a stage count together
            squares = [p.gradient.square().sum(-1) for p in products if p.stage == stage]
            found.tokens.setdefault((layer, stage), []).append(torch.stack(squares).sum(0))
        for p in products:
            if p.name in names:
                gram = found.grams.setdefault(p.name, torch.zeros(p.gradient.shape[1], p.gradient.shape[1]))
                gram.addmm_(p.gradient.T, p.gradient)
    found.batches += 1


def _tempered(squares: torch.Tensor, stage: int) -> torch.Tensor:
    weights, share = (squares, _SHARE) if stage == _ATTENTION_INPUT else (squares.sqrt(), 1.0)
    mean = float(weights.mean())
    return share * weights / mean + (1 - share) if mean > 0 else torch.ones_like(weights)
