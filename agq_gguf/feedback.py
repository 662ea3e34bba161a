"""Error feedback (GPTQ, arXiv 2210.17323): columns are rounded one after the other, and what one loses the following
ones, as far as they are correlated with it, make up for.

With H = E[x x^T] and H^-1 = U^T U, U upper triangular, rounding column k of the weights W to Q changes the later
columns by -(W_k - Q_k) / U_kk * U_k,later, and the output loses ((W_k - Q_k) / U_kk)^2 per row.
"""

from __future__ import annotations

import torch

from agq_gguf.blocks import GROUP_COLUMNS
from agq_gguf.codebook import Codebook, reciprocal, search_scales


def factor(hessian: torch.Tensor, damping: float) -> torch.Tensor | None:
    """U [K, K] float32 for H [K, K] with `damping` times its mean diagonal added; None if H is not positive definite.

    With J reversing the order, J H J = L L^T gives H = R R^T with R = J L J upper triangular, so that U is R^-1: one
    Cholesky and one triangular inverse, where inverting H first would take twice the work.
    """
    columns = len(hessian)
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(damping * float(damped.diagonal().mean()))
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        damped, info = damped.double(), info
        lower, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return None
    identity = torch.eye(columns, dtype=lower.dtype)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
    return inverse if bool(torch.isfinite(inverse).all()) else None


def quantize(weights: torch.Tensor, upper: torch.Tensor, codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [M, K] int64 and scales [M, K / 64] for weights [M, K] (not changed) with `upper` from `factor`.

    The scale of a group is searched when its turn comes, on weights that already carry the earlier errors.
    """
    rows, columns = weights.shape
    rest = weights.T.clone(memory_format=torch.contiguous_format)  # [K, M]: a column is one contiguous row
    codes = torch.empty(columns, rows, dtype=torch.int64)
    scales = torch.empty(columns // GROUP_COLUMNS, rows)
    for g in range(columns // GROUP_COLUMNS):
        here = slice(g * GROUP_COLUMNS, (g + 1) * GROUP_COLUMNS)
        group, inside = rest[here], upper[here, here]
        importance = inside.diagonal().square().reciprocal()[None]
        scales[g] = search_scales(group.T.contiguous(), importance, codebook)
        inverse = reciprocal(scales[g])
        errors = torch.empty_like(group)
        for j in range(GROUP_COLUMNS):
            normal = group[j] * inverse
            codes[here.start + j] = codebook.encode(normal)
            errors[j] = (group[j] - codebook.nearest(normal) * scales[g]) / inside[j, j]
            group[j + 1 :].addr_(inside[j, j + 1 :], errors[j], alpha=-1)
        rest[here.stop :].addmm_(upper[here, here.stop :].T, errors, alpha=-1)
    return codes.T.contiguous(), scales.T.contiguous()
