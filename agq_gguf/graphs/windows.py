"""Windows on flat memory: how to take one with operations that have gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agq_gguf.graphs.trace import Raw

SIZES = {"f32": 4, "f16": 2, "i32": 4, "i64": 8, "bf16": 2}  # bytes of a value


@dataclass(frozen=True)
class Cut:
    """Cuts flat memory by falling strides: trim, split into rows, keep some of the rows; once for each dimension."""

    steps: tuple[tuple[int, int, int, int], ...]  # trim to, length of a row, first row, rows
    at: int  # the place that is taken of the last rows
    axes: tuple[int, ...]  # ggml's dimension of each step


@dataclass(frozen=True)
class Strided:
    """A window that cannot be cut out, because its rows overlap; sizes and strides slowest first."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def is_contiguous(t: Raw) -> bool:
    """Whether the values of a tensor lie in memory without gaps; true for weights."""
    if t.type not in SIZES:
        return True
    step = SIZES[t.type]
    for n, b in zip(t.ne, t.nb, strict=True):
        if n not in (1, 0) and b != step:
            return False
        step *= n
    return True


def strides_of(t: Raw, size: int) -> tuple[int, ...]:
    """Strides in values of `size` bytes, fastest first."""
    return tuple(b // size for b in t.nb)


def window(t: Raw, root: Raw, size: int) -> Cut | Strided:
    """How to take the tensor `t` out of the flat values of its root; `size` is the bytes of a value."""
    strides, offset = strides_of(t, size), t.view_offs // size
    axes = sorted((i for i in range(4) if t.ne[i] != 1), key=lambda i: -strides[i])
    steps: list[tuple[int, int, int, int]] = []
    length, at = math.prod(root.ne), offset
    for depth, i in enumerate(axes):
        step, n = strides[i], t.ne[i]
        inside = sum((t.ne[j] - 1) * strides[j] for j in axes[depth + 1 :]) + 1
        if step <= 0 or at % step + inside > step or at // step + n > length // step:
            return Strided(tuple(reversed(t.ne)), tuple(reversed(strides)), offset)
        steps.append((length // step * step, step, at // step, n))
        length, at = step, at % step
    return Cut(tuple(steps), at, tuple(axes))
