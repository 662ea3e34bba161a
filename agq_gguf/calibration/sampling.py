"""Chooses a sample of tokens, rows or blocks, evenly spread but not at regular steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, however many are taken


def spread(count: int, total: int) -> NDArray[np.int64]:
    """`count` of the numbers below `total`, ascending; all of them if `count` is larger.

    Takes one number from each of `count` equal parts, each time at another place within the part. Regular steps could
    coincide with the length of texts, rows or blocks: of every 128th token of chunks of 512, each fourth is the first
    of a text, which often differs from all others.
    """
    count = min(count, total)
    parts = np.arange(count + 1, dtype=np.int64) * total // max(count, 1)
    return parts[:-1] + (np.arange(count) * _GOLDEN % 1 * np.diff(parts)).astype(np.int64)
