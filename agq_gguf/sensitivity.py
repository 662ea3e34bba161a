"""How much each token of the calibration text matters: the Fisher information of what it computes.

A model's divergence from itself under small changes is a quadratic form, E[(g . dy)^2] / 2, where dy is the change of
a matrix's product and g the gradient of -log p(token), the token drawn from the model's own prediction. Where the next
word is certain g is next to nothing, and an error there costs nothing; so |g|^2 says how much a token's input should
weigh in the Hessian of that matrix. (That the Hessian should see the loss behind the layer: arXiv 2505.07004; here in
its simplest form, one weight per token and input.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from agq_gguf.journal import Journal
from agq_gguf.llama_graph import STAGES, LlamaGraph, State

# |g|^2 is heavy-tailed. Keys and values need it as it is: for them the first token of a text, on which attention rests,
# matters hundreds of times as much as others (with |g| its values lose 1.5 times as much on SmolLM2). A share of plain
# counting keeps the Hessian from resting on a few hundred tokens. Elsewhere |g| is better on text not seen, by 2%.
_SHARE = 0.8
_ATTENTION_INPUT = 0  # stage
Weights = dict[tuple[int, int], torch.Tensor]  # (layer, stage) -> [tokens] float32 of mean 1, over all batches in order


def token_weights(
    graph: LlamaGraph, batches: list[torch.Tensor], journal: Journal, progress: Callable[[int], None], seed: int = 0
) -> Weights:
    """Weights for the inputs of all stages; `batches` hold tokens [batch, tokens] int64.

    One backward pass: about three times the work of running the text. `journal` has the batches that an earlier run has
    finished, and gets the others.
    """
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    stages = [(layer, stage) for layer in range(graph.shape.n_layer) for stage in range(len(STAGES))]
    done = 0
    for i, tokens in enumerate(batches):
        kept = journal.get(f"gradients {i}")
        if kept is None:
            squares = _squares(graph, tokens, torch.Generator().manual_seed(seed + i))
            kept = {f"{layer}.{stage}": squares[layer, stage].numpy() for layer, stage in stages}
            journal.put(f"gradients {i}", kept)
        for layer, stage in stages:
            found.setdefault((layer, stage), []).append(torch.from_numpy(kept[f"{layer}.{stage}"]))
        done += tokens.numel()
        progress(done)
    return {key: _tempered(torch.cat(parts), key[1]) for key, parts in found.items()}


def _squares(
    graph: LlamaGraph, tokens: torch.Tensor, generator: torch.Generator
) -> dict[tuple[int, int], torch.Tensor]:
    """|g|^2 [tokens] of all products of a stage together, by layer and stage."""
    found = {}
    inputs = [graph.embed(tokens)]
    with torch.no_grad():
        for layer in range(graph.shape.n_layer):
            inputs.append(graph.block(layer, inputs[-1], graph.linear))
    gradient, _ = logits_gradient(graph, inputs.pop(), generator)
    for layer in reversed(range(graph.shape.n_layer)):
        gradient, products = block_gradients(graph, layer, inputs.pop(), gradient)
        for stage in range(len(STAGES)):
            squares = [p.gradient.square().sum(-1) for p in products if p.stage == stage]
            found[layer, stage] = torch.stack(squares).sum(0)
    return found


def _tempered(squares: torch.Tensor, stage: int) -> torch.Tensor:
    weights, share = (squares, _SHARE) if stage == _ATTENTION_INPUT else (squares.sqrt(), 1.0)
    mean = float(weights.mean())
    return share * weights / mean + (1 - share) if mean > 0 else torch.ones_like(weights)


def logits_gradient(
    graph: LlamaGraph, x: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of -log p of drawn tokens, by the last block's x and by the logits [tokens, vocabulary]."""
    x = x.detach().requires_grad_()
    logits = graph.logits(x)
    scores = functional.log_softmax(logits, -1).flatten(0, -2)
    with torch.no_grad():
        drawn = torch.multinomial(scores.exp(), 1, generator=generator)
    by_x, by_logits = torch.autograd.grad(-scores.gather(1, drawn).sum(), [x, logits])
    return by_x, by_logits.flatten(0, -2)


@dataclass(frozen=True)
class Product:
    """What a matrix of a block is multiplied with, and the gradient by what comes out; [tokens, channels]."""

    stage: int
    name: str  # without ".weight"
    given: torch.Tensor
    gradient: torch.Tensor


def block_gradients(
    graph: LlamaGraph, layer: int, x: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, list[Product]]:
    """Gradient by the block's x, given the one by its result, and those by all its products."""
    x = x.detach().requires_grad_()
    state: State = (x, None)
    made: list[tuple[int, str, torch.Tensor, torch.Tensor]] = []
    for stage, names in enumerate(STAGES):
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
