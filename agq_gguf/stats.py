"""What calibration knows of the input of a matrix product, and how that is saved, loaded and merged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError
from agq_gguf.reader import open_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"  # names in llama.cpp's imatrix files


@dataclass(frozen=True)
class InputStats:
    """Statistics of one input x [tokens, K] over the calibration text, in input-channel order.

    `mean_square` is E[x^2]; where the source is an imatrix it is all there is. `sample` holds rows of x as they were,
    spread over the text, so that choices about activations can be tried out. `hessian` is E[x x^T].
    """

    tokens: int
    mean_square: NDArray[np.float32]  # [K]
    abs_max: NDArray[np.float32] | None = None  # [K]
    sample: NDArray[np.float32] | None = None  # [n, K]
    hessian: NDArray[np.float32] | None = None  # [K, K]

    @property
    def columns(self) -> int:
        """K."""
        return len(self.mean_square)


@dataclass(frozen=True)
class WeightStats:
    """What is known for one weight: the input as a whole and, for experts, the part that each expert has seen.

    Weights that multiply the same input share the object, so identity tells what can share work.
    """

    whole: InputStats
    experts: tuple[InputStats, ...] = ()

    def of(self, expert: int) -> InputStats:
        """Statistics for one expert's matrix."""
        return self.experts[expert] if self.experts else self.whole


def load_imatrix(path: str | os.PathLike[str]) -> dict[str, WeightStats]:
    """Reads an importance matrix as llama-imatrix writes it (GGUF): mean squares per weight and expert.

    Raises InputError when the file is no imatrix or its tensors do not fit together.
    """
    with open_gguf(path) as reader:
        if reader.get("general.type") != "imatrix":
            raise InputError(f"{path}: not an imatrix (general.type is {reader.get('general.type')!r})")
        found: dict[str, WeightStats] = {}
        for key in reader.tensors:
            if not key.endswith(_SUMS):
                continue
            name = key.removesuffix(_SUMS)
            if name + _COUNTS not in reader.tensors:
                raise InputError(f"{path}: {name} has sums and no counts")
            sums, counts = reader.read(key).astype(np.float64), reader.read(name + _COUNTS).reshape(-1)
            sums = sums.reshape(-1, sums.shape[-1])
            sane = all(np.isfinite(values).all() and (values >= 0).all() for values in (sums, counts))
            # A count is one of tokens, so it is no fraction of one; sums within float32 then stay within it.
            if len(sums) != len(counts) or not sane or ((counts > 0) & (counts < 1)).any():
                raise InputError(f"{path}: the entry of {name} is damaged")
            found[name] = _from_sums(sums, counts.astype(np.float64))
            if not np.isfinite(found[name].whole.mean_square).all():
                raise InputError(f"{path}: the entry of {name} is damaged")
    if not found:
        raise InputError(f"{path}: holds no entries")
    return found


def _from_sums(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> WeightStats:
    """Sums of squares [experts, K] and counts [experts]; an expert that was never used gets the mean of all."""
    total = max(float(counts.sum()), 1.0)
    with np.errstate(over="ignore"):  # the caller looks for infinities
        whole = InputStats(int(counts.sum()), (sums.sum(axis=0) / total).astype(np.float32))
    if len(counts) == 1:
        return WeightStats(whole)
    experts = [
        InputStats(int(n), (row / n).astype(np.float32) if n else whole.mean_square)
        for row, n in zip(sums, counts, strict=True)
    ]
    return WeightStats(whole, tuple(experts))


def check_shapes(stats: Mapping[str, WeightStats], shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises InputError unless the statistics that there are fit the weights' shapes (numpy order)."""
    for name, shape in shapes.items():
        found = stats.get(name)
        if found is None:
            continue
        have, want = found.whole.columns, shape[-1]
        if have != want:
            raise InputError(f"{origin}: has {have} channels for {name}, the model has {want}; is it another model's?")
        if found.experts and (len(shape) != 3 or len(found.experts) != shape[0]):
            raise InputError(f"{origin}: has {len(found.experts)} experts for {name} of shape {shape}")
