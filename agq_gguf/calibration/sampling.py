"""Which few of many things to look at, where the many have a rhythm of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, however many are taken


def spread(count: int, total: int) -> NDArray[np.int64]:
    """`count` of the numbers below `total`, ascending; all of them if there are not so many.

    One of each of `count` equal parts, each time at another place of it: even steps would fall in with the length of
    texts, rows or blocks. Every 128th token of chunks of 512, for one, is each fourth time the first of a text, which
    is often unlike all others.
    """
    count = min(count, total)
    parts = np.arange(count + 1, dtype=np.int64) * total // max(count, 1)
    return parts[:-1] + (np.arange(count) * _GOLDEN % 1 * np.diff(parts)).astype(np.int64)
