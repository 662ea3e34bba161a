"""Error feedback between rows: other rows compensate for the error of a row, as far as later layers mix their outputs.

A changed matrix W - E gives y - E x. This costs E[(g^T E x)^2] / 2, where g is the gradient with respect to y. If
inputs and gradients are treated as independent, the cost is tr(G E H E^T) with G = E[g g^T] and H = E[x x^T] (Kronecker
factors of the Fisher information, arXiv 1503.05671; for rounding, arXiv 2505.22988). `column_feedback` uses H, between
columns. G works the same way between rows: with E_c fixed, the best later rows r are W_r + G_rr^-1 G_rc E_c.
"""

from __future__ import annotations

import torch

from agq_gguf.format.blocks import GROUP_COLUMNS
from agq_gguf.matrix import column_feedback
from agq_gguf.matrix.codebook import Codebook
from agq_gguf.matrix.column_feedback import Correlations
from agq_gguf.matrix.factor import inverse_factor, reordered

# Rows that are rounded together, without feedback among them. 64 rows give 12% more loss; 8 rows give 2% less loss and
# take twice the time (text model, layers 1 and 3).
_ROWS = 16
# Added to G, as a share of its mean diagonal. Between 0.1 and 0.3 the divergence on text not seen is the same.
_DAMPING = 0.2


def damped(gram: torch.Tensor) -> torch.Tensor:
    """G with damping added to its diagonal."""
    found = gram.clone()
    found.diagonal().add_(_DAMPING * float(gram.diagonal().mean()))
    return found


def quantize(
    weights: torch.Tensor, known: Correlations, gram: torch.Tensor, codebook: Codebook, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `column_feedback.quantize`, with feedback between rows, too; `gram` is G [M, M].

    Rows whose errors cost most come first, because few later rows are left to compensate for the errors of the last
    ones.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(reordered(damped(gram), order))
    if upper is None:  # no later layer depends on this matrix
        return column_feedback.quantize(weights, known, codebook, sweeps)
    rest = weights[order]
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    scales = torch.empty(len(weights), weights.shape[1] // GROUP_COLUMNS)
    for begin in range(0, len(rest), _ROWS):
        here, later = slice(begin, begin + _ROWS), slice(begin + _ROWS, None)
        found, scale = column_feedback.quantize(rest[here], known, codebook, sweeps)
        codes[order[here]], scales[order[here]] = found, scale
        error = rest[here] - codebook.values[found.int()] * scale.repeat_interleave(GROUP_COLUMNS, 1)
        shares = torch.linalg.solve_triangular(upper[here, here].T, error, upper=False)
        rest[later].addmm_(upper[here, later].T, shares, alpha=-1)
    return codes, scales
