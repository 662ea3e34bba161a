"""Factors the inverse of a Hessian, as error feedback needs it; large ones in place and block by block."""

from __future__ import annotations

import torch

_BLOCK = 1024  # larger matrices are factored block by block; LAPACK's copies of a block are small


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """U of H^-1 = U^T U, upper triangular, for one H [n, n] or several [groups, n, n].

    Returns None if H is not positive definite. A large H is overwritten, by U if all goes well; that needs memory for
    one block of columns more.

    Let J reverse the order. J H J = L L^T gives H = R R^T with R = J L J upper triangular, so U is R^-1. This takes one
    Cholesky factorization and one triangular inverse; inverting H first would take twice the work.
    """
    if hessian.shape[-1] > _BLOCK:
        return hessian if _root_in_place(hessian) and _inverse_in_place(hessian) else None
    root = _upper_root(hessian)
    return None if root is None else _upper_inverse(root)


def _upper_root(h: torch.Tensor) -> torch.Tensor | None:
    """R upper triangular with H = R R^T."""
    reversed_ = h.flip(-2, -1)
    lower, info = torch.linalg.cholesky_ex(reversed_)
    if bool(info.any()):
        lower, info = torch.linalg.cholesky_ex(reversed_.double())
    return None if bool(info.any()) else lower.flip(-2, -1)


def _upper_inverse(root: torch.Tensor) -> torch.Tensor | None:
    """R^-1 as float32."""
    lower = root.flip(-2, -1)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(-2, -1).float().contiguous()
    return upper if bool(torch.isfinite(upper).all()) else None


def _parts(n: int) -> list[slice]:
    return [slice(begin, min(begin + _BLOCK, n)) for begin in range(0, n, _BLOCK)]


def _root_in_place(h: torch.Tensor) -> bool:
    """Replaces the upper triangle of H with R, from the last block of columns to the first; False if it cannot."""
    parts = _parts(len(h))
    for k in reversed(range(len(parts))):
        here = parts[k]
        corner = _upper_root(h[here, here])
        if corner is None:
            return False
        h[here, here] = corner.float()
        if k == 0:
            return True
        before = slice(0, here.start)
        panel = torch.linalg.solve_triangular(h[here, here].T, h[before, here], upper=False, left=False)
        h[before, here] = panel
        for columns in parts[:k]:
            rows = slice(0, columns.stop)  # the lower triangle is not needed
            h[rows, columns].addmm_(panel[rows], panel[columns].T, alpha=-1)
    return True


def _inverse_in_place(h: torch.Tensor) -> bool:
    """Replaces R in the upper triangle with R^-1 and the rest with zeros; False if the result is not finite."""
    parts = _parts(len(h))
    for k, here in enumerate(parts):
        corner = _upper_inverse(h[here, here])
        if corner is None:
            return False
        h[here, : here.start] = 0
        h[here, here] = corner
        # Above the corner: -R'^-1 P C, where R'^-1 is what is done, P this block of columns and C the corner's inverse.
        panel = h[: here.start, here].clone()
        for rows in parts[:k]:
            h[rows, here] = -(h[rows, rows.start : here.start] @ panel[rows.start :]) @ corner
        if not bool(torch.isfinite(h[: here.stop, here]).all()):
            return False
    return True


def reorder_in_place(matrix: torch.Tensor, order: torch.Tensor) -> None:
    """Replaces a matrix [n, n] with matrix[order][:, order]; needs memory for one block of rows more."""
    for rows in _parts(len(matrix)):
        matrix[rows] = matrix[rows][:, order]
    moved = torch.zeros(len(order), dtype=torch.bool)
    for begin, source in enumerate(order.tolist()):
        # Rows move along the cycles of the permutation.
        if moved[begin] or source == begin:
            continue
        first, at = matrix[begin].clone(), begin
        while source != begin:
            matrix[at] = matrix[source]
            moved[at] = True
            at, source = source, int(order[source])
        matrix[at] = first
        moved[at] = True


def reordered(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A copy of matrix[order][:, order] that makes no second one."""
    found = torch.empty_like(matrix)
    for rows in _parts(len(matrix)):
        torch.index_select(matrix[order[rows]], 1, order, out=found[rows])
    return found
