"""What calibration knows of the input of a matrix product, and how that is saved, loaded and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError


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
