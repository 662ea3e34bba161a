"""Gradients of -log p(token) for tokens drawn from the model's own prediction, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from agq_gguf.graphs.llama import LlamaGraph, State


def logits_gradient(
    graph: LlamaGraph, x: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of -log p of drawn tokens, with respect to the last block's x and the logits [tokens, vocabulary]."""
    x = x.detach().requires_grad_()
    logits = graph.logits(x)
    scores = functional.log_softmax(logits, -1).flatten(0, -2)
    with torch.no_grad():
        drawn = torch.multinomial(scores.exp(), 1, generator=generator)
    by_x, by_logits = torch.autograd.grad(-scores.gather(1, drawn).sum(), [x, logits])
    return by_x, by_logits.flatten(0, -2)


@dataclass(frozen=True)
class Product:
    """The input of a matrix of a block, and the gradient with respect to its output; [tokens, channels]."""

    stage: int
    name: str  # without ".weight"
    given: torch.Tensor
    gradient: torch.Tensor


def block_gradients(
    graph: LlamaGraph, layer: int, x: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, list[Product]]:
    """Gradients with respect to the block's x and to all its products, given `gradient` with respect to its output."""
    x = x.detach().requires_grad_()
    state: State = (x, None)
    made: list[tuple[int, str, torch.Tensor, torch.Tensor]] = []
    for stage, names in enumerate(graph.stages):
        given = graph.stage_input(layer, stage, state)
        products = [graph.linear(f"blk.{layer}.{name}", given) for name in names]
        made += [(stage, f"blk.{layer}.{name}", given, p) for name, p in zip(names, products, strict=True)]
        state = graph.stage_output(layer, stage, state, products)
    before, *gradients = torch.autograd.grad(state[0], [x, *(product for *_, product in made)], gradient)
    found = [
        Product(stage, name, given.detach().flatten(0, 1), g.flatten(0, 1))
        for (stage, name, given, _), g in zip(made, gradients, strict=True)
    ]
    return before, found
