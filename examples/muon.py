"""Muon, an optimizer that makes the momentum of each matrix orthogonal, so that all directions learn equally fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Moves the singular values of matrices (many, rows, columns) to about 1, with a quintic Newton iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0; gives values between 0.7 and 1.2, which is good enough for a step
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """For matrices inside a network; not for embeddings, heads and norms."""

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0):
        """lr: size of a step's singular values; decay: share of the weights lost per lr."""
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does one step; matrices of the same shape are processed together."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for weight in group["params"]:
                shapes[weight.shape].append(weight)
            for weights in shapes.values():
                moved = []
                for weight in weights:
                    mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                    mean.lerp_(weight.grad, 1 - group["momentum"])
                    moved.append(weight.grad.lerp(mean, group["momentum"]))
                rows, columns = weights[0].shape[-2:]
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                stacked = torch.stack(moved)  # the experts of a mixture are matrices of their own
                changes = orthogonal(stacked.flatten(0, -3)).view_as(stacked)
                for weight, change in zip(weights, changes, strict=True):
                    weight.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=scale)
