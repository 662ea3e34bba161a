"""What the statistics of an input need in memory, and what fits under a bound."""

from __future__ import annotations

_BLOCK_ROWS = 2 * 1024  # rows of a Hessian that are copied while it is factored (matrix/factor.py)


def hessian_bytes(columns: int) -> int:
    """Bytes of one Hessian [K, K] in float32."""
    return 4 * columns**2


def work_bytes(columns: int) -> int:
    """Bytes that quantizing with a Hessian needs beside it: the factor of its inverse, and some rows."""
    return hessian_bytes(columns) + 4 * columns * min(columns, _BLOCK_ROWS)


def hessians_that_fit(columns: int, experts: int, memory: int) -> int:
    """How many Hessians an input gets within `memory` bytes.

    One for each expert if they fit, else one for the whole input, else 0: then only the correlations inside each group
    of columns are known, as with quality `fast`.
    """
    for count in {max(experts, 1): None, 1: None}:
        if count * hessian_bytes(columns) + work_bytes(columns) <= memory:
            return count
    return 0
