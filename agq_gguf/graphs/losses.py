"""What a change of a model's output costs: for logits their divergence, for embeddings 1 - cosine."""

from __future__ import annotations

import torch
from torch.nn import functional


def drawn(output: torch.Tensor, logits: bool, generator: torch.Generator) -> torch.Tensor:
    """A scalar of an output [batch, rows, columns] with a gradient g that tells what a small change dy costs.

    The cost is (g . dy)^2 / 2 on average over what is drawn. For logits the scalar is -log p of a token drawn from the
    prediction; for embeddings it is their direction, seen along a random one.
    """
    if logits:
        scores = functional.log_softmax(output, -1).flatten(0, -2)
        with torch.no_grad():
            tokens = torch.multinomial(scores.exp(), 1, generator=generator)
        return -scores.gather(1, tokens).sum()
    along = torch.randn(output.shape, generator=generator)
    return (functional.normalize(output, dim=-1) * along).sum()


def divergence(wanted: torch.Tensor, found: torch.Tensor, logits: bool) -> torch.Tensor:
    """For each row of outputs [batch, rows, columns]: KL(wanted || found) in nats for logits, else 1 - cosine."""
    if not logits:
        return 1 - functional.cosine_similarity(wanted, found, dim=-1)
    p, q = functional.log_softmax(wanted, -1), functional.log_softmax(found, -1)
    return (p.exp() * (p - q)).sum(-1)
