"""Sums over the rows of one input, and `InputStats` and `WeightStats` made from them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats, WeightStats
from agq_gguf.errors import InputError

_COPIED_ROWS = 1024
SAMPLE_ROWS = 256  # rows of an input that are kept as a sample
_EXPERT_PRIOR = 128  # the whole input is mixed into an expert's own statistics with the weight of so many tokens


class Accumulator:
    """Sums over the rows of one input."""

    def __init__(self, columns: int, rows_per_call: int, with_hessian: bool, first_weight: float = 1.0) -> None:
        self.tokens = self.calls = 0
        self.square = np.zeros(columns, np.float64)
        self.abs_max = np.zeros(columns, np.float32)
        self.sample: list[NDArray[np.float32]] = []
        self.rows_per_call = rows_per_call
        self.more_of_first = math.sqrt(first_weight)
        self.gram = torch.zeros(columns, columns) if with_hessian else None

    def add(self, x: NDArray[np.float32]) -> None:
        """Adds rows [n, K]."""
        if not len(x):
            return
        square = np.einsum("nk,nk->k", x, x, dtype=np.float64)
        if not np.isfinite(square).all():
            raise InputError(
                "the model computes a NaN or an infinity on the calibration text; its weights may be damaged"
            )
        self.tokens += len(x)
        self.square += square
        np.maximum(self.abs_max, np.abs(x).max(axis=0), out=self.abs_max)
        if sum(map(len, self.sample)) < SAMPLE_ROWS:
            # Each chunk is sampled at other places, because the first token of a text often differs from all others.
            step = max(1, len(x) // self.rows_per_call)
            self.sample.append(x[self.calls * 7919 % step :: step][: self.rows_per_call].copy())
        self.calls += 1
        if self.gram is not None:
            rows = torch.from_numpy(x.copy())
            rows[0] *= self.more_of_first
            self.gram.addmm_(rows.T, rows)

    def stats(self) -> InputStats:
        """Statistics from the sums. Must be the last call, because it overwrites the sums."""
        n = max(self.tokens, 1)
        sample = np.concatenate(self.sample) if self.sample else np.zeros((0, len(self.square)), np.float32)
        hessian = None if self.gram is None else self.gram.div_(n).numpy()
        return InputStats(self.tokens, (self.square / n).astype(np.float32), self.abs_max, sample, hessian)


def finish(sums: list[Accumulator]) -> WeightStats:
    """Statistics of one input from its sums: one, or one for each expert. Overwrites the sums."""
    if len(sums) == 1:
        return WeightStats(sums[0].stats())
    parts = [total.stats() for total in sums]
    whole = merge(parts)
    own = tuple(_with_prior(part, whole) for part in parts)
    return WeightStats(replace(whole, hessian=None), own)  # each expert has its own


def merge(parts: list[InputStats]) -> InputStats:
    """Statistics over the rows of all parts."""
    tokens = sum(part.tokens for part in parts)
    shares = [np.float32(part.tokens / max(tokens, 1)) for part in parts]
    hessian = None
    if parts[0].hessian is not None:
        hessian = np.zeros_like(parts[0].hessian)
        for part, share in zip(parts, shares, strict=True):
            if part.hessian is not None:
                for rows in _rows(hessian):
                    hessian[rows] += part.hessian[rows] * share
    every = max(1, len(parts) // 2)
    return InputStats(
        tokens,
        np.sum([part.mean_square * s for part, s in zip(parts, shares, strict=True)], axis=0, dtype=np.float32),
        np.max([part.abs_max for part in parts if part.abs_max is not None], axis=0),
        np.concatenate([part.sample[::every] for part in parts if part.sample is not None]),
        hessian,
    )


def own_share(tokens: int) -> float:
    """How much of an expert's statistics comes from the `tokens` that it has seen; the rest, from all tokens."""
    return tokens / (tokens + _EXPERT_PRIOR)


def _with_prior(own: InputStats, whole: InputStats) -> InputStats:
    """An expert's statistics mixed with those of all experts; the fewer tokens it has seen, the more.

    The expert's Hessian is overwritten.
    """
    s = np.float32(own_share(own.tokens))
    if own.hessian is not None and whole.hessian is not None:
        mixed = own.hessian
        for rows in _rows(mixed):
            mixed[rows] = mixed[rows] * s + whole.hessian[rows] * (1 - s)
    square = own.mean_square * s + whole.mean_square * (1 - s)
    return InputStats(own.tokens, square, whole.abs_max, whole.sample, own.hessian)


def _rows(matrix: NDArray[np.float32]) -> list[slice]:
    """Parts of the rows, small enough for a temporary copy."""
    return [slice(begin, begin + _COPIED_ROWS) for begin in range(0, len(matrix), _COPIED_ROWS)]
