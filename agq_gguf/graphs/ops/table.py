"""The table of operations: ggml's name -> what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Memo = dict[tuple[Any, ...], Any]  # what an operation computes once for a graph, by a key of its own
Operation = Callable[..., torch.Tensor]  # (node, memo, *inputs): None where there is no input

OPS: dict[str, Operation] = {}


def op(*names: str) -> Callable[[Operation], Operation]:
    """Enters a function into the table."""

    def register(function: Operation) -> Operation:
        OPS.update(dict.fromkeys(names, function))
        return function

    return register


def repeated(small: torch.Tensor, big: torch.Tensor) -> torch.Tensor:
    """ggml's broadcasting of the second operand: any dimension may be repeated a whole number of times."""
    times = [1 if s in (1, b) else b // s for s, b in zip(small.shape[1:], big.shape[1:], strict=True)]
    return small.repeat(1, *times) if max(times) > 1 else small


def same_batch(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The values with one batch size; those that do not depend on the tokens are repeated."""
    batch = max(map(len, values))
    return tuple(x.expand(batch, *x.shape[1:]) for x in values)
