"""Scales and codebooks: which scale a group of weights gets, and which 16 values its codes stand for.

All functions are pure and work on torch float32 tensors. A group is 64 weights of one row; errors are weighted by `h`,
the mean square of the input channel (or the diagonal of the Hessian, which is the same up to a factor).
"""

from __future__ import annotations

import torch

from agq_gguf.blocks import round_scale

# Values of the codes where none are learned: the fixed point of `learn` on Gaussian weights, rounded. The ends differ in
# size because the sign of a scale is free: the largest weight of a group is put on the far end, whatever its sign.
FIXED = (-64, -48, -37, -28, -21, -15, -9, -4, 2, 8, 14, 20, 27, 34, 43, 54)

_ENDS = 1.0 + 0.04 * torch.arange(-8, 5)  # of the scale that puts the largest weight on an end of the codebook
_CHUNK = 1 << 14  # groups searched at a time: bounds memory
_SAMPLE = 1 << 12  # groups a codebook is learned from
_ROUNDS = 8


def boundaries(codebook: torch.Tensor) -> torch.Tensor:
    """Where the nearest code changes: the 15 midpoints of [16] ascending values."""
    return (codebook[1:] + codebook[:-1]) / 2


def reciprocal(scales: torch.Tensor) -> torch.Tensor:
    """1 / D, and 0 for the scale 0 of an all-zero group."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def encode(weights: torch.Tensor, scales: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Nearest codes, int64, of weights [N, n] with one scale per row [N]."""
    return torch.bucketize(weights * reciprocal(scales)[:, None], boundaries(codebook))


def storable(scales: torch.Tensor) -> torch.Tensor:
    """`blocks.round_scale` on a torch tensor."""
    return torch.from_numpy(round_scale(scales.numpy()))


def search_scales(weights: torch.Tensor, h: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Best storable scale [N] for each group of `weights` [N, 64], with error weights `h` [N or 1, 64].

    For each candidate (largest weight to either end of the codebook, times `_ENDS`) the codes are fixed and the scale is
    refitted in closed form; with codes q the weighted error of the best scale is sum(h w^2) - sum(h w q)^2 / sum(h q^2).
    """
    found = [
        _search(weights[i : i + _CHUNK], h[i : i + _CHUNK] if len(h) > 1 else h, codebook)
        for i in range(0, len(weights), _CHUNK)
    ]
    return torch.cat(found)


def _search(weights: torch.Tensor, h: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    middle = boundaries(codebook)
    largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
    weighted = weights * h
    best_gain = torch.zeros_like(largest)
    best = torch.zeros_like(largest)
    for end in (codebook[0], codebook[-1]):
        for factor in _ENDS:
            scale = largest * (factor / end)
            q = codebook[torch.bucketize(weights * reciprocal(scale)[:, None], middle)]
            product = (weighted * q).sum(1)
            square = (q * q * h).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
            gain = product * product / square
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, product / square, best)
    return storable(best)


def fixed() -> torch.Tensor:
    return torch.tensor(FIXED, dtype=torch.float32)


def learn(weights: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Codebook [16] of whole numbers -64..63 for the groups `weights` [N, 64] with error weights `h` [N or 1, 64].

    Weighted Lloyd iterations on weights divided by their scales, alternating with `search_scales`, on an even sample of
    the groups. Returns the fixed codebook where the learned one is not better.
    """
    step = -(-len(weights) // _SAMPLE)
    weights, h = weights[::step], h[::step] if len(h) > 1 else h
    codebook = fixed()
    for _ in range(_ROUNDS):
        codebook = _lloyd(weights, h, codebook)
    codebook = _whole(codebook)
    return codebook if _error(weights, h, codebook) < _error(weights, h, fixed()) else fixed()


def _lloyd(weights: torch.Tensor, h: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """One round: scales, codes, then each code's value becomes the weighted mean of what it stands for."""
    scales = search_scales(weights, h, codebook)
    codes = encode(weights, scales, codebook).reshape(-1)
    mass = (h * scales.square()[:, None]).expand_as(weights).reshape(-1).double()
    normal = (weights * reciprocal(scales)[:, None]).reshape(-1).double()
    total = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, mass)
    mean = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, mass * normal) / total
    moved = torch.where(total > 0, mean, codebook.double()).float().sort().values
    return moved * (64 / moved.abs().max())


def _whole(codebook: torch.Tensor) -> torch.Tensor:
    if codebook.max() > -codebook.min():
        codebook = -codebook.flip(0)  # the far end is negative: -64 exists, 64 does not; scales flip their sign
    return codebook.round().clamp(-64, 63)


def _error(weights: torch.Tensor, h: torch.Tensor, codebook: torch.Tensor) -> float:
    scales = search_scales(weights, h, codebook)
    difference = weights - scales[:, None] * codebook[encode(weights, scales, codebook)]
    return float((difference.square() * h).sum(dtype=torch.float64))
