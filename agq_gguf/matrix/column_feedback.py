"""Rounding that minds correlations: error feedback (GPTQ, arXiv 2210.17323), then coordinate descent.

What a matrix of weights W [M, K] loses on inputs x by becoming Q is tr((W - Q) H (W - Q)^T) with H = E[x x^T]. Error
feedback rounds columns one after the other and lets the following ones, as far as they are correlated, make up for what
one loses: with H^-1 = U^T U, U upper triangular, rounding column k changes the later columns by
-(W_k - Q_k) / U_kk * U_k,later at a loss of ((W_k - Q_k) / U_kk)^2 per row. Descent then visits all columns again, now
that all others are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from agq_gguf.format.blocks import GROUP_COLUMNS
from agq_gguf.matrix import kernels
from agq_gguf.matrix.codebook import Codebook


@dataclass(frozen=True)
class Correlations:
    """What error feedback needs to know of an input of K channels, in stored order unless said otherwise.

    Where nothing is known between groups of columns, matrices are [K / 64, 64, 64], one for each group, in place of
    [K, K].
    """

    hessian: torch.Tensor  # float32, damped
    order: torch.Tensor  # [K] int64, the stored columns in the order of their rounding, groups in one piece
    upper: torch.Tensor  # float32, U of the damped Hessian in that order

    @property
    def coupled(self) -> bool:
        """Whether columns of different groups are correlated."""
        return self.hessian.dim() == 2

    @cached_property
    def hessian_groups(self) -> list[torch.Tensor]:
        """What of the Hessian is inside of each group of columns, [64, 64], by their places."""
        return _diagonal_blocks(self.hessian)

    @cached_property
    def upper_groups(self) -> list[torch.Tensor]:
        """The same of `upper`, in the order of rounding."""
        return _diagonal_blocks(self.upper)

    @property
    def importance(self) -> torch.Tensor:
        """What a squared error of each column costs [K], once the columns after it have made up for what they can."""
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
    """Prepares H, [K, K] or [K / 64, 64, 64], with `damping` times its mean diagonal added.

    Returns None if it is not positive definite then.

    `noise` [K] is what rounding adds to E[x^2] of each channel.

    Channels of much energy come first, since the last ones find nobody to make up for their errors; whole groups, and
    columns inside a group, because a group gets its scale when its turn comes.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(damping * float(diagonal.mean()))
    if noise is not None:
        diagonal.add_(noise.view_as(diagonal))
    energy = diagonal.reshape(-1, GROUP_COLUMNS)
    inside = energy.argsort(dim=1, descending=True, stable=True)
    if hessian.dim() == 3:
        order = (torch.arange(len(energy))[:, None] * GROUP_COLUMNS + inside).reshape(-1)
        each = torch.arange(len(energy))[:, None, None]
        upper = inverse_factor(damped[each, inside[:, :, None], inside[:, None, :]])
    else:
        groups = energy.sum(1).argsort(dim=0, descending=True, stable=True)
        order = (groups[:, None] * GROUP_COLUMNS + inside[groups]).reshape(-1)
        upper = inverse_factor(damped[order][:, order])
    return None if upper is None else Correlations(damped, order, upper)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """U of H^-1 = U^T U, for one H [n, n] or several [groups, n, n].

    With J reversing the order, J H J = L L^T gives H = R R^T with R = J L J upper triangular, so that U is R^-1: one
    Cholesky and one triangular inverse, where inverting H first would take twice the work.
    """
    reversed_ = hessian.flip(-2, -1)
    lower, info = torch.linalg.cholesky_ex(reversed_)
    if bool(info.any()):
        lower, info = torch.linalg.cholesky_ex(reversed_.double())
    if bool(info.any()):
        return None
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(-2, -1).float()
    return upper if bool(torch.isfinite(upper).all()) else None


def quantize(
    weights: torch.Tensor, known: Correlations, codebook: Codebook, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] uint8 and scales [M, K / 64] for weights [M, K] in stored order, which are left as they are."""
    codes, scales = _feed_back(weights, known, codebook)
    _descend(weights, known, codebook, codes, scales, sweeps)
    return codes.T.contiguous(), scales.T.contiguous()


# Below, matrices are transposed, [K, M]: one column of the weights is one contiguous row.


def _feed_back(weights: torch.Tensor, known: Correlations, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, M] and scales [K / 64, M]; a group's scale is chosen on weights that carry the earlier errors.

    The search minds one column at a time; which of the scales around its result is best once columns make up for each
    other, only rounding the group with each of them tells. That brings 1.3% less error.
    """
    rest, upper = weights.T[known.order], known.upper
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    scales = torch.empty(len(rest) // GROUP_COLUMNS, rest.shape[1])
    for g, inside in enumerate(known.upper_groups):
        here, later = slice(g * GROUP_COLUMNS, (g + 1) * GROUP_COLUMNS), slice((g + 1) * GROUP_COLUMNS, None)
        columns = known.order[here]
        found, scale, errors = kernels.feed_back(codebook.values, inside, rest[here])
        codes[columns], scales[columns[0] // GROUP_COLUMNS] = found, scale
        if known.coupled:
            rest[later].addmm_(upper[here, later].T, errors, alpha=-1)
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

    With the slope S = H (W - Q), column k alone is best at Q_k + S_k / H_kk, and the scale of a group with values c at
    D + c S / c H c. Every step lowers the loss or leaves it.
    """
    restored = codebook.values[codes.int()] * scales.repeat_interleave(GROUP_COLUMNS, 0)
    slope = times(known.hessian, weights.T - restored)
    for _ in range(sweeps):
        for g, inside in enumerate(known.hessian_groups):
            here = slice(g * GROUP_COLUMNS, (g + 1) * GROUP_COLUMNS)
            change = kernels.descend(codebook.values, inside, slope[here], codes[here], scales[g])
            if known.coupled:
                slope.addmm_(known.hessian[:, here], change, alpha=-1)
            else:
                slope[here].addmm_(inside, change, alpha=-1)
