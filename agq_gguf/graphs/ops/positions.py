"""Rotary positions."""

from __future__ import annotations

import math

import torch

from agq_gguf.graphs.ir import Node
from agq_gguf.graphs.ops.table import Memo, op

# ggml's modes: neighbours (i, i + 1) are rotated, or halves (i, i + n / 2); several positions for each token; all
# channels of the image encoder; sections that alternate.
_NEIGHBOURS, _SECTIONS, _VISION, _ALTERNATING = 0, 8, 24, 40


@op("ROPE")
def rope(
    node: Node, memo: Memo, x: torch.Tensor, places: torch.Tensor, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """x [batch, 1, tokens, heads, channels], turned by the angles of its positions."""
    dims, mode, first = node.i32(1), node.i32(2), node.i32(15)
    assert node.raw is not None
    key = ("turns", node.raw.params, node.inputs[1:], x.shape[-1])
    if key not in memo:
        memo[key] = _turns(node, places, factors, x.shape[-1])
    cos, sin = memo[key]  # [tokens, 1, channels / 2]
    if mode == _VISION:
        first, dims = 0, x.shape[-1]
    part = x[..., first : first + dims]
    if mode == _NEIGHBOURS:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    if dims == x.shape[-1]:
        return turned
    return torch.cat([x[..., :first], turned, x[..., first + dims :]], -1)


def _turns(
    node: Node, places: torch.Tensor, factors: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all tokens and pairs of channels."""
    dims, mode = node.i32(1), node.i32(2)
    base, scale, extrapolated, magnitude = (node.f32(i) for i in range(5, 9))
    pairs = (width if mode == _VISION else dims) // 2
    i = torch.arange(pairs, dtype=torch.float64)
    frequency = base ** (-2.0 * i / dims)
    if factors is not None:
        frequency = frequency / factors.flatten()[:pairs].double()
    flat = places.flatten().double()
    if mode & _SECTIONS:
        kind, start = _sections(node, mode, pairs)
        if mode == _VISION:
            frequency = base ** (-2.0 * (torch.arange(pairs) % sum(_sizes(node)) - start) / dims)
        angle = flat.view(4, -1)[kind].T * frequency
    else:
        angle = flat[:, None] * frequency
    scaled = angle * scale
    if extrapolated:
        mix = _extrapolation(node, i, dims, base) * extrapolated
        scaled = scaled * (1 - mix) + angle * mix
        magnitude *= 1 + 0.1 * math.log(1 / scale)
    return (scaled.cos() * magnitude).float()[:, None], (scaled.sin() * magnitude).float()[:, None]


def _extrapolation(node: Node, i: torch.Tensor, dims: int, base: float) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): how much of each frequency stays as it was trained."""
    trained, fast, slow = node.i32(4), node.f32(9), node.f32(10)

    def place(rotations: float) -> float:
        return dims * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0.0, math.floor(place(fast))), min(dims - 1.0, math.ceil(place(slow)))
    return 1 - ((i - low) / max(0.001, high - low)).clamp(0, 1)


def _sizes(node: Node) -> list[int]:
    return [node.i32(11 + j) for j in range(4)]


def _sections(node: Node, mode: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of channels, which of the four positions of a token turns it, and where its section begins."""
    sizes = _sizes(node)
    sector = torch.arange(pairs) % sum(sizes)
    if mode == _ALTERNATING:
        kind = torch.full((pairs,), 3)
        for j in range(3):
            kind[(sector % 3 == j) & (sector < 3 * sizes[j])] = j
        return kind, torch.zeros(pairs, dtype=torch.int64)
    ends = torch.tensor(sizes).cumsum(0)
    kind = (sector[:, None] >= ends[None, :3]).sum(1)
    return kind, torch.cat([torch.zeros(1, dtype=torch.int64), ends[:3]])[kind]
