"""Statistics of the input of a matrix product, from calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError


@dataclass(frozen=True)
class InputStats:
    """Statistics of one input x [tokens, K] over the calibration text, in input-channel order.

    `mean_square` is E[x^2]; an imatrix gives only this. `sample` holds some rows of x, spread over the text, to try
    choices about activations on. `hessian` is E[x x^T].
    """

    tokens: int
    mean_square: NDArray[np.float32]  # [K]
    abs_max: NDArray[np.float32] | None = None  # [K]
    sample: NDArray[np.float32] | None = None  # [n, K]
    hessian: NDArray[np.float32] | None = None  # [K, K]

    @property
    def columns(self) -> int:
        """Number of channels, K."""
        return len(self.mean_square)


@dataclass(frozen=True)
class WeightStats:
    """Statistics for one weight: of its whole input and, for experts, of the part that each expert has seen.

    Weights with the same input share one object, so object identity shows which weights can share work.
    """

    whole: InputStats
    experts: tuple[InputStats, ...] = ()

    @property
    def unused_experts(self) -> list[int]:
        """The experts that no token reached; `of` gives them the statistics of all experts."""
        return [expert for expert, stats in enumerate(self.experts) if not stats.tokens]

    def of(self, expert: int) -> InputStats:
        """Statistics for one expert's matrix."""
        return self.experts[expert] if self.experts else self.whole


def check_shapes(stats: Mapping[str, WeightStats], shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raises InputError unless the given statistics match the weights' shapes (numpy order)."""
    for name, shape in shapes.items():
        found = stats.get(name)
        if found is None:
            continue
        have, want = found.whole.columns, shape[-1]
        if have != want:
            raise InputError(
                f"{origin}: has {have} channels for {name}, but the model has {want}; it belongs to another model"
            )
        if found.experts and (len(shape) != 3 or len(found.experts) != shape[0]):
            raise InputError(
                f"{origin}: has {len(found.experts)} experts for {name}, which does not match its shape {shape}; "
                "it belongs to another model"
            )
