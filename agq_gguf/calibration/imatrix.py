"""Reads importance matrices of llama-imatrix."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq_gguf.calibration.stats import InputStats, WeightStats, check_shapes
from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import Reader, open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"  # names in llama.cpp's imatrix files


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix that was read, and where."""

    path: Path
    weights: dict[str, WeightStats]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Imatrix:
        """Raises InputError as `load_imatrix` does."""
        return cls(Path(path), load_imatrix(path))

    def check(self, model: Reader) -> None:
        """Raises InputError if it does not match the matrices of the model."""
        shapes = {name: tensor.shape for name, tensor in model.tensors.items() if len(tensor.shape) > 1}
        check_shapes(self.weights, shapes, str(self.path))


def load_imatrix(path: str | os.PathLike[str]) -> dict[str, WeightStats]:
    """Reads an importance matrix that llama-imatrix wrote (GGUF): mean squares per weight and expert.

    Raises InputError if the file is not an imatrix or is damaged.
    """
    with open_gguf(path) as reader:
        if reader.get("general.type") != "imatrix":
            raise InputError(
                f"{path}: not an imatrix: general.type must be 'imatrix', got {reader.get('general.type')!r}"
            )
        found: dict[str, WeightStats] = {}
        for key in reader.tensors:
            if not key.endswith(_SUMS):
                continue
            name = key.removesuffix(_SUMS)
            if name + _COUNTS not in reader.tensors:
                raise InputError(f"{path}: the entry of {name} has sums but no counts; make the imatrix again")
            sums, counts = reader.read(key).astype(np.float64), reader.read(name + _COUNTS).reshape(-1)
            sums = sums.reshape(-1, sums.shape[-1])
            sane = all(np.isfinite(values).all() and (values >= 0).all() for values in (sums, counts))
            # Counts are numbers of tokens, so they are 0 or at least 1. Dividing by them keeps sums within float32.
            if len(sums) != len(counts) or not sane or ((counts > 0) & (counts < 1)).any():
                raise InputError(f"{path}: the entry of {name} is damaged; make the imatrix again")
            found[name] = _from_sums(sums, counts.astype(np.float64))
            if not np.isfinite(found[name].whole.mean_square).all():
                raise InputError(f"{path}: the entry of {name} is damaged; make the imatrix again")
    if not found:
        raise InputError(f"{path}: the imatrix is empty; make it again")
    return found


def _from_sums(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> WeightStats:
    """Statistics from sums of squares [experts, K] and counts [experts]; an unused expert gets the mean of all."""
    total = max(float(counts.sum()), 1.0)
    with np.errstate(over="ignore"):  # the caller checks for infinities
        whole = InputStats(int(counts.sum()), (sums.sum(axis=0) / total).astype(np.float32))
    if len(counts) == 1:
        return WeightStats(whole)
    experts = [
        InputStats(int(n), (row / n).astype(np.float32) if n else whole.mean_square)
        for row, n in zip(sums, counts, strict=True)
    ]
    return WeightStats(whole, tuple(experts))
