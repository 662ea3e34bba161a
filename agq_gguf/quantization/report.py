"""The result of `quantize`, for each tensor and for the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

REPLACED = "adjusted together with the matrices that follow"  # the report says this of norms that were changed


@dataclass(frozen=True)
class TensorReport:
    """Result for one tensor."""

    name: str
    type_name: str
    n_elements: int
    n_bytes: int
    reason: str = ""  # why it is not AGQ4
    error: float | None = None  # of searched codes: squared output error over squared output on the calibration data
    note: str = ""  # a fallback that was used, and why


@dataclass(frozen=True)
class Report:
    """Result for a model."""

    tensors: list[TensorReport]
    n_bytes: int  # of the file
    guidance: str  # what guided the quantization
    warnings: list[str]
    paths: list[Path] = field(compare=False)  # the files; the first is the one to open
    source_bytes: int = 0  # of all files of the source
    small_bytes: int = 0  # what the file would have with the preset `small`; 0 if not smaller

    def by_type(self) -> dict[str, tuple[int, int, float]]:
        """Type name -> (tensors, bytes, bits per weight), largest first."""
        found: dict[str, tuple[int, int, float]] = {}
        for type_name in {tensor.type_name for tensor in self.tensors}:
            group = [tensor for tensor in self.tensors if tensor.type_name == type_name]
            n_bytes = sum(tensor.n_bytes for tensor in group)
            found[type_name] = (len(group), n_bytes, 8 * n_bytes / sum(tensor.n_elements for tensor in group))
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors, without the header."""
        return 8 * sum(t.n_bytes for t in self.tensors) / sum(t.n_elements for t in self.tensors)
