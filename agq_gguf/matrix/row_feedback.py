"""Error feedback between rows: other rows compensate for the error of a row, as far as later layers mix their outputs.

A changed matrix W - E gives y - E x. This costs E[(g^T E x)^2] / 2, where g is the gradient with respect to y. If
inputs and gradients are treated as independent, the cost is tr(G E H E^T) with G = E[g g^T] and H = E[x x^T] (Kronecker
factors of the Fisher information, arXiv 1503.05671; for rounding, arXiv 2505.22988). `column_feedback` uses H, between
columns. G works the same way between rows: with E_c fixed, the best later rows r are W_r + G_rr^-1 G_rc E_c.
"""

from __future__ import annotations

from collections.abc import Callable

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


def in_panels(
    weights: torch.Tensor, gram: torch.Tensor, round_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> bool:
    """Rounds a matrix [M, K] some rows at a time, with feedback to the rows that are left; `gram` is G [M, M].

    Calls `round_rows` with the numbers of some rows [n] and their weights [n, K], which include the feedback; it
    returns what they are after rounding. Rows whose errors cost most come first, because few later rows are left to
    compensate for the errors of the last ones. Returns False, without a call, if no later layer depends on the matrix.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(reordered(damped(gram), order))
    if upper is None:
        return False
    rest = weights[order]
    for begin in range(0, len(rest), _ROWS):
        here, later = slice(begin, begin + _ROWS), slice(begin + _ROWS, None)
        error = rest[here] - round_rows(order[here], rest[here])
        shares = torch.linalg.solve_triangular(upper[here, here].T, error, upper=False)
        rest[later].addmm_(upper[here, later].T, shares, alpha=-1)
    return True


def quantize(
    weights: torch.Tensor, known: Correlations, gram: torch.Tensor, codebook: Codebook, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `column_feedback.quantize`, with feedback between rows, too; `gram` is G [M, M]."""
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    scales = torch.empty(len(weights), weights.shape[1] // GROUP_COLUMNS)

    def round_rows(numbers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found, scale = column_feedback.quantize(rows, known, codebook, sweeps)
        codes[numbers], scales[numbers] = found, scale
        return codebook.values[found.int()] * scale.repeat_interleave(GROUP_COLUMNS, 1)

    if not in_panels(weights, gram, round_rows):
        return column_feedback.quantize(weights, known, codebook, sweeps)
    return codes, scales
