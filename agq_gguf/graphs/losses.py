"""What a change of a model's output costs: for logits their divergence, for embeddings 1 - cosine."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def drawn(output: torch.Tensor, logits: bool, generator: torch.Generator) -> torch.Tensor:
    """A scalar of an output [batch, rows, columns] with a gradient g that tells what a small change dy costs.

    The cost is (g . dy)^2 / 2 on average over what is drawn. For logits the scalar is -log p of a token drawn from the
    prediction; for embeddings it is their direction, seen along a random one.
    """
    # Numbers are drawn on the CPU, so that they are the same for every device.
    if logits:
        found: torch.Tensor = _Drawn.apply(output.flatten(0, -2), generator)  # type: ignore[no-untyped-call]
        return found
    along = torch.randn(output.shape, generator=generator).to(output.device)
    return (functional.normalize(output, dim=-1) * along).sum()


class _Drawn(torch.autograd.Function):
    """-log p of tokens drawn from p = softmax(logits), summed over the rows of logits [n, columns].

    With 260 thousand columns, logits are most of the memory and a third of the time of a small model. So the gradient,
    p minus 1 at the drawn token, is made in place of p, and one random number is drawn for each row.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        p = logits.softmax(-1)
        ends = p.cumsum(-1)
        places = torch.rand(len(p), 1, generator=generator).to(p.device) * ends[:, -1:]
        tokens = torch.searchsorted(ends, places, right=True).clamp_(max=p.shape[1] - 1)
        del ends
        loss = -p.gather(1, tokens).clamp_min(torch.finfo(torch.float32).tiny).log().sum()
        ctx.save_for_backward(p.scatter_add_(1, tokens, torch.full_like(places, -1.0)))
        return loss

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * given[0], None


def divergence(wanted: torch.Tensor, found: torch.Tensor, logits: bool) -> torch.Tensor:
    """For each row of outputs [batch, rows, columns]: KL(wanted || found) in nats for logits, else 1 - cosine."""
    if not logits:
        return 1 - functional.cosine_similarity(wanted, found, dim=-1)
    p, q = functional.log_softmax(wanted, -1), functional.log_softmax(found, -1)
    return (p.exp() * (p - q)).sum(-1)
