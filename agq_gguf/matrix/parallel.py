"""Runs pieces of work that are too small for torch's own threads, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

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
