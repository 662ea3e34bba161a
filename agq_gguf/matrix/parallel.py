"""Runs pieces of work that are too small for torch's own threads, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_ROWS_AT_A_TIME = 1024  # the weights and slopes of so many rows fit into the cache
_ROWS_OF_A_THREAD = 96  # fewer rows are not worth a thread

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """Results for all parts, as many at a time as torch has threads."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) <= 1:
        return [work(part) for part in parts]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)


def rows_at_a_time(rows: int) -> int:
    """How many rows of a matrix make a piece: each thread gets an equal share of limited size."""
    threads = max(1, min(torch.get_num_threads(), rows // _ROWS_OF_A_THREAD))
    shares = threads * -(-rows // (threads * _ROWS_AT_A_TIME))
    return -(-rows // shares)
