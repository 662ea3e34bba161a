"""Goes backward through a graph segment by segment: gradients with respect to what every weight yields."""

from __future__ import annotations

from collections.abc import Callable

import torch

from agq_gguf.graphs.run import Executor, Reading, State
from agq_gguf.graphs.segments import Segment

Loss = Callable[[torch.Tensor], torch.Tensor]  # output [batch, rows, columns] -> scalar
Visit = Callable[[Reading, torch.Tensor], None]  # a place with a weight, and the gradient by what it yields


def gradients(run: Executor, parts: list[Segment], tokens: torch.Tensor, loss: Loss, visit: Visit) -> float:
    """The loss for `tokens` [batch, n] int64; calls `visit` once for every place with a weight, the last one first.

    Memory: the state at the end of each segment, and the values of one segment, which is computed again for it.
    """
    states = [run.start(tokens)]
    with torch.no_grad():
        for part in parts[:-1]:
            after = run.run(states[-1], part.begin, part.end)
            states.append({i: after[i] for i in part.alive})
    by_state: State = {}  # gradients by the values behind the segment
    value = 0.0
    made: list[tuple[Reading, torch.Tensor]] = []

    def follow(place: Reading) -> torch.Tensor:
        found = place.of(run.weight(place.weight))
        if not found.requires_grad:  # the first place of all: nothing before it has a gradient
            found.requires_grad_()
        made.append((place, found))
        return found

    for number in reversed(range(len(parts))):
        part, state = parts[number], states.pop()
        leaves = {i: v.detach().requires_grad_() for i, v in state.items() if v.is_floating_point()}
        made.clear()
        with run.replacing(readings=follow):
            after = run.run(state | leaves, part.begin, part.end)
        if number == len(parts) - 1:
            total = loss(after[run.graph.output].flatten(1, 3))
            value = float(total.detach())
            ends, weights = [total], [torch.ones_like(total)]
        else:
            kept = [i for i in part.alive if i in by_state and i not in leaves and after[i].requires_grad]
            ends, weights = [after[i] for i in kept], [by_state[i] for i in kept]
        del after
        inputs = [*leaves.values(), *(found for _, found in made)]
        grads = torch.autograd.grad(ends, inputs, weights, allow_unused=True) if ends else (None,) * len(inputs)
        passed = {i: by_state[i] for i in leaves if i in by_state}  # alive before the segment and behind it
        by_state = {}
        for i, gradient in zip(leaves, grads[: len(leaves)], strict=True):
            both = [g for g in (gradient, passed.get(i)) if g is not None]
            if both:
                by_state[i] = both[0] if len(both) == 1 else both[0] + both[1]
        for (place, found), gradient in reversed(list(zip(made, grads[len(leaves) :], strict=True))):
            plain = Reading(place.node, place.weight, None if place.given is None else place.given.detach(), place.ids)
            visit(plain, torch.zeros_like(found) if gradient is None else gradient)
    return value
