"""Rounds a matrix with regard to correlated inputs: error feedback (GPTQ, arXiv 2210.17323), then coordinate descent.

If a matrix W [M, K] is replaced by Q, the loss on inputs x is tr((W - Q) H (W - Q)^T) with H = E[x x^T]. Error feedback
rounds one column after another; later columns that are correlated with a column compensate for its error. With
H^-1 = U^T U, U upper triangular, rounding column k changes the later columns by -(W_k - Q_k) / U_kk * U_k,later at a
loss of ((W_k - Q_k) / U_kk)^2 per row. Coordinate descent then visits all columns again, now that all others are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from agq_gguf.format.blocks import GROUP_COLUMNS
from agq_gguf.matrix import kernels
from agq_gguf.matrix.codebook import Codebook
from agq_gguf.matrix.factor import inverse_factor, reordered

_FEW = 32  # so many rows, or fewer, are slow in a library's products; a kernel of ours multiplies them
_MORE_DAMPING = 9  # times the damping, added where a first attempt to factor the Hessian fails


@dataclass(frozen=True)
class Correlations:
    """Facts about an input of K channels that error feedback needs, in stored order unless noted.

    If correlations between groups of columns are not known, matrices are [K / 64, 64, 64], one for each group, instead
    of [K, K].
    """

    hessian: torch.Tensor  # float32, damped
    added: torch.Tensor  # [K], what damping and noise have added to its diagonal
    order: torch.Tensor  # [K] int64, the stored columns in the order of rounding; columns of a group are consecutive
    upper: torch.Tensor  # float32, U of the damped Hessian in that order

    @property
    def coupled(self) -> bool:
        """Whether columns of different groups are correlated."""
        return self.hessian.dim() == 2

    @cached_property
    def hessian_groups(self) -> list[torch.Tensor]:
        """The part of the Hessian inside each group of columns [64, 64], in stored order."""
        return _diagonal_blocks(self.hessian)

    @cached_property
    def upper_groups(self) -> list[torch.Tensor]:
        """The part of `upper` inside each group of columns [64, 64], in the order of rounding."""
        return _diagonal_blocks(self.upper)

    @property
    def importance(self) -> torch.Tensor:
        """Cost [K] of a squared error in each column, after later columns have compensated for it."""
        found = torch.empty(len(self.order))
        found[self.order] = self.upper.diagonal(dim1=-2, dim2=-1).flatten().square().reciprocal()
        return found


def _diagonal_blocks(matrix: torch.Tensor) -> list[torch.Tensor]:
    if matrix.dim() == 3:
        return [part.contiguous() for part in matrix]
    begins = range(0, len(matrix), GROUP_COLUMNS)
    return [matrix[i : i + GROUP_COLUMNS, i : i + GROUP_COLUMNS].contiguous() for i in begins]


def times(hessian: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """H x [K, M] for x [K, M] and a Hessian [K, K] or [K / 64, 64, 64]."""
    if hessian.dim() == 2:
        return hessian @ x
    return (hessian @ x.unflatten(0, (-1, GROUP_COLUMNS))).flatten(0, 1)


def correlations(hessian: torch.Tensor, damping: float, noise: torch.Tensor | None = None) -> Correlations | None:
    """Prepares H, [K, K] or [K / 64, 64, 64], with `damping` times its mean diagonal added in place.

    `noise` [K] is added to the diagonal: rounding the activations adds it to E[x^2] of each channel. If the result is
    not positive definite, there is a second attempt with more damping; then returns None.

    Channels with the most energy come first, because few later columns are left to compensate for the errors of the
    last ones. Groups are ordered as a whole, and columns within each group, because a group gets its scales when it is
    rounded.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    diagonal.add_(damping * float(diagonal.mean()))
    if noise is not None:
        diagonal.add_(noise.view_as(diagonal))
    energy = diagonal.reshape(-1, GROUP_COLUMNS)
    inside = energy.argsort(dim=1, descending=True, stable=True)
    if hessian.dim() == 3:
        order = (torch.arange(len(energy))[:, None] * GROUP_COLUMNS + inside).reshape(-1)
    else:
        groups = energy.sum(1).argsort(dim=0, descending=True, stable=True)
        order = (groups[:, None] * GROUP_COLUMNS + inside[groups]).reshape(-1)
    upper = _factor(hessian, order, inside)
    if upper is None:
        diagonal.add_(_MORE_DAMPING * damping * float(before.mean()))
        upper = _factor(hessian, order, inside)
    return None if upper is None else Correlations(hessian, (diagonal - before).flatten(), order, upper)


def _factor(hessian: torch.Tensor, order: torch.Tensor, inside: torch.Tensor) -> torch.Tensor | None:
    """U of the Hessian with its columns in the order of rounding; `inside` [K / 64, 64] is the order in each group."""
    if hessian.dim() == 2:
        return inverse_factor(reordered(hessian, order))
    each = torch.arange(len(hessian))[:, None, None]
    return inverse_factor(hessian[each, inside[:, :, None], inside[:, None, :]])


def quantize(
    weights: torch.Tensor, known: Correlations, codebook: Codebook, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] uint8 and scales [M, K / 64] for weights [M, K] in stored order; `weights` does not change."""
    codes, scales = _feed_back(weights, known, codebook)
    _descend(weights, known, codebook, codes, scales, sweeps)
    return codes.T.contiguous(), scales.T.contiguous()


# Below, matrices are transposed, [K, M], so that one column of the weights is one contiguous row.


def _feed_back(weights: torch.Tensor, known: Correlations, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, M] and scales [K / 64, M]; a group's scale is chosen after earlier errors are added to its weights.

    The search for a scale treats columns independently. So the group is rounded with each of the scales near its
    result, with feedback between columns, and the best one is taken. This lowers the error by 1.3%.
    """
    rest, upper = weights.T[known.order], known.upper
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    scales = torch.empty(len(rest) // GROUP_COLUMNS, rest.shape[1])
    few = known.coupled and rest.shape[1] <= _FEW
    errors = torch.empty_like(rest if few else rest[:0])
    for g, inside in enumerate(known.upper_groups):
        begin, end = g * GROUP_COLUMNS, (g + 1) * GROUP_COLUMNS
        here, columns = rest[begin:end], known.order[begin:end]
        if few:
            kernels.subtract_product(upper[:begin, begin:end], errors[:begin], here)
        found, scale, error = kernels.feed_back(codebook.values, inside, here)
        codes[columns], scales[columns[0] // GROUP_COLUMNS] = found, scale
        if few:
            errors[begin:end] = error
        elif known.coupled:
            rest[end:].addmm_(upper[begin:end, end:].T, error, alpha=-1)
    return codes, scales


def _descend(
    weights: torch.Tensor,
    known: Correlations,
    codebook: Codebook,
    codes: torch.Tensor,
    scales: torch.Tensor,
    sweeps: int,
) -> None:
    """Coordinate descent from codes [K, M] and scales [K / 64, M], in place.

    With the slope S = H (W - Q), the best value of column k alone is Q_k + S_k / H_kk, and the best scale of a group
    with values c is D + c S / c H c. No step increases the loss.
    """
    restored = codebook.values[codes.int()] * scales.repeat_interleave(GROUP_COLUMNS, 0)
    slope = times(known.hessian, weights.T - restored)
    few = known.coupled and slope.shape[1] <= _FEW
    changes = torch.zeros_like(slope if few else slope[:0])  # since the slope was computed
    for _ in range(sweeps):
        for g, inside in enumerate(known.hessian_groups):
            here = slice(g * GROUP_COLUMNS, (g + 1) * GROUP_COLUMNS)
            now = slope[here]
            if few:
                now = now.clone()
                kernels.subtract_product(known.hessian[:, here], changes, now)
            change = kernels.descend(codebook.values, inside, now, codes[here], scales[g])
            if few:
                changes[here] += change
            elif known.coupled:
                slope.addmm_(known.hessian[:, here], change, alpha=-1)
            else:
                now.addmm_(inside, change, alpha=-1)
