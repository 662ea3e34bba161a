"""Samples are even, whatever the number of things they are taken from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agq_gguf.calibration.sampling import spread


@given(st.integers(0, 3000), st.integers(1, 1 << 40))
def test_spread(count: int, total: int) -> None:
    found = spread(count, total)
    assert len(found) == min(count, total) == len(np.unique(found))
    assert not len(found) or (found.min() >= 0 and found.max() < total)
    if len(found):
        gaps = np.diff(np.append(found, found[0] + total))
        assert gaps.min() > 0 and gaps.max() <= 2 * (total // len(found) + 1)


def test_no_rhythm() -> None:
    """Neither the first tokens of chunks nor the last rows of a matrix of 2^n groups are all that is seen."""
    for period in (128, 512, 1024):
        share = np.mean(spread(256, 1 << 15) % period == 0)
        assert share <= 4 / period
    rows = spread(2048, 1 << 14) // 16
    assert len(np.unique(rows)) > 900
