"""Measures how much an error in each matrix product changes the model's predictions (Fisher information).

For small changes the divergence of a model from itself is a quadratic form, E[(g . dy)^2] / 2. Here dy is the change of
a matrix's product and g is the gradient of -log p(token), with the token drawn from the model's own prediction. Where
the next word is certain, g is close to zero and an error costs almost nothing. So |g|^2 is the weight of a token's
input in the Hessian of the matrix. (arXiv 2505.07004 shows that the Hessian should include the loss after the layer;
this is the simplest form, one weight per token and input.) E[g g^T] says which errors of the outputs cancel
(`row_feedback`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.graphs.gradients import gradients
from agq_gguf.graphs.losses import drawn
from agq_gguf.graphs.parts import Plan, groups, keys_and_values
from agq_gguf.graphs.run import Executor, Reading
from agq_gguf.graphs.segments import segments
from agq_gguf.quantization.resume import Journal

# |g|^2 has a heavy tail. Keys and values need |g|^2: when a head has nothing to attend to, it attends to the first
# token of a text, so that token matters hundreds of times as much as others (with |g| its values lose 1.5 times as much
# on SmolLM2). The rest of the weight, 1 - _SHARE, is the same for all tokens, so that the Hessian does not depend on a
# few hundred tokens. For the other inputs |g| is better by 2% on text not seen.
_SHARE = 0.8
_KEPT_BATCHES = 8  # an interrupted run repeats at most so many batches


@dataclass
class Sensitivity:
    """Sums over `batches` batches of the text."""

    batches: int = 0
    rows: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # |g|^2, by the key of a `parts.Group`
    grams: dict[str, torch.Tensor] = field(default_factory=dict)  # sum of g g^T [M, M], by weight
    squares: dict[str, torch.Tensor] = field(default_factory=dict)  # [K, K]: what errors in the rows of a table cost
    attended: frozenset[str] = frozenset()  # weights whose products are keys or values

    def weights(self, names: Collection[str]) -> torch.Tensor | None:
        """Weight of each row in the input of a group with these weights: float32 with mean 1. None: all the same.

        Rows are tokens, or tokens and the experts that they use.
        """
        parts = [self.rows[name] for name in names if name in self.rows]
        return _tempered(torch.cat(parts[0]), not self.attended.isdisjoint(names)) if parts else None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The content as arrays, for a journal."""
        rows = {f"rows {name}": torch.cat(parts).numpy() for name, parts in self.rows.items()}
        sums = {"gram": self.grams, "square": self.squares}
        kept = {f"{kind} {name}": m.cpu().numpy() for kind, found in sums.items() for name, m in found.items()}
        return {"batches": np.array(self.batches), **rows, **kept}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """The inverse of `arrays`."""
        self.batches = int(arrays["batches"])
        for key, value in arrays.items():
            kind, _, name = key.partition(" ")
            if kind == "rows":
                self.rows[name] = [torch.from_numpy(value)]
            elif kind == "gram":
                self.grams[name] = torch.from_numpy(value)
            elif kind == "square":
                self.squares[name] = torch.from_numpy(value)


def measure(
    run: Executor,
    plan: Plan,
    batches: list[torch.Tensor],
    names: Collection[str],
    journal: Journal,
    progress: Callable[[int], None],
    *,
    tables: Collection[str] = (),
    logits: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """Runs `batches`, tokens [batch, n] int64, forward and backward: about three times the work of a forward run.

    `names` are the matrices to compute E[g g^T] for, `tables` those whose looked up rows are to be weighed. `journal`
    holds the results of an earlier run and receives new ones. `logits` says what the graph's output is. A table that is
    also an output matrix is weighed by both.
    """
    found = Sensitivity(attended=frozenset(keys_and_values(run.graph)))
    kept = journal.get("sensitivity")
    if kept is not None:
        found.restore(kept)
    keys = {name: group.key for stage in plan.stages for group in groups(run.graph, stage) for name in group.weights}
    parts = segments(run.graph)
    done = sum(tokens.numel() for tokens in batches[: found.batches])
    for i in range(found.batches, len(batches)):
        progress(done)
        adder = _Adder(found, keys, names, tables)
        loss = partial(drawn, logits=logits, generator=torch.Generator().manual_seed(seed + i))
        gradients(run, parts, batches[i], loss, adder.visit)
        adder.finish()
        done += batches[i].numel()
        if found.batches % _KEPT_BATCHES == 0 or found.batches == len(batches):
            journal.put("sensitivity", found.arrays())
    progress(done)
    return found


def affordable(rows: dict[str, int], memory: int) -> set[str]:
    """The matrices whose G fit into `memory` bytes together, smallest first; `rows` maps names to rows."""
    found, left = set(), memory
    for name, n in sorted(rows.items(), key=lambda item: item[1]):
        left -= 4 * n * n
        if left >= 0:
            found.add(name)
    return found


class _Adder:
    """Adds the gradients of one batch; `keys` are those of the groups, by weight."""

    def __init__(
        self, found: Sensitivity, keys: Mapping[str, str], names: Collection[str], tables: Collection[str]
    ) -> None:
        self._found, self._keys, self._names, self._tables = found, keys, names, tables
        self._squares: dict[str, list[torch.Tensor]] = {}  # |g|^2 of each place

    def visit(self, place: Reading, gradient: torch.Tensor) -> None:
        """Adds the gradient by what a place yields."""
        name, flat = place.weight, gradient.flatten(0, -2)
        if name in self._tables:
            # An error e in a row costs (g . e)^2 where the row is looked up, |g|^2 (x . e)^2 in a product with x.
            seen = flat if place.given is None else place.given.flatten(0, -2) * flat.norm(dim=-1, keepdim=True)
            self._add_gram(self._found.squares, name, seen)
        if place.given is None:
            return
        if key := self._keys.get(name):  # summed over the matrices and channels of a group
            self._squares.setdefault(key, []).append(flat.square().sum(-1))
        if name in self._names:
            self._add_gram(self._found.grams, name, flat)

    def finish(self) -> None:
        """Adds what the places of the batch have; in float64, so that their order does not change the sum."""
        for key, squares in self._squares.items():
            self._found.rows.setdefault(key, []).append(torch.stack(squares).double().sum(0).float().cpu())
        self._found.batches += 1

    @staticmethod
    def _add_gram(sums: dict[str, torch.Tensor], name: str, gradient: torch.Tensor) -> None:
        size = gradient.shape[1]
        if name not in sums:
            sums[name] = torch.zeros(size, size)
        sums[name] = sums[name].to(gradient.device).addmm_(gradient.T, gradient)


def _tempered(squares: torch.Tensor, attended: bool) -> torch.Tensor:
    weights, share = (squares, _SHARE) if attended else (squares.sqrt(), 1.0)
    mean = float(weights.mean())
    return share * weights / mean + (1 - share) if mean > 0 else torch.ones_like(weights)
