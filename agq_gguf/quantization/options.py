"""What a user can choose when a model is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.matrix.options import MatrixOptions

QUALITIES = ("fast", "balanced", "best")


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user can choose."""

    quality: str = "balanced"  # one of QUALITIES
    resume: bool = False  # keep what is finished beside the output, and go on from there
    output_type: str = "auto"  # q8_0, or what the target allows
    embedding_type: str = "auto"  # q8_0 for small models, else agq4
    target_bpw: float = 0.0  # bits per weight of the whole model, at most; 0: no target
    threads: int = 0  # 0: all that this process may use
    memory: int = 4 << 30  # bytes that calibration may use for the statistics it holds at a time
    calibration_tokens: int = 32768  # at most
    tune: bool = True  # norms and scales, in the end (`best`)
    context: int = 512  # tokens of a calibration chunk
    split_size: int = 0  # bytes of a file, at most; 0: one file
    matrix: MatrixOptions = field(default_factory=MatrixOptions)

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise InputError(f"unknown quality {self.quality!r}; known are {', '.join(QUALITIES)}")
        if not (np.isfinite(self.target_bpw) and self.target_bpw >= 0):
            raise InputError(f"the target is {self.target_bpw} bits per weight, it must be a positive number")
        if self.quality == "fast":
            object.__setattr__(self, "matrix", replace(self.matrix, error_feedback=False))


def activation_options(bits: int, scale: str = "rotated") -> MatrixOptions:
    """How matrices are quantized for activations of 8 or 4 bits, with a scale per "token", per token and "group" of 64
    channels, or per group after it was "rotated" (docs/format.md)."""
    if bits not in (4, 8):
        raise InputError(f"activations of {bits} bits are not to be had, only 8 and 4")
    if scale not in blocks.ACTIVATION_SCALES:
        known = ", ".join(map(repr, blocks.ACTIVATION_SCALES))
        raise InputError(f"activations with a scale per {scale!r} are not to be had, only {known}")
    return MatrixOptions(activation_bits=bits, activation_scale=scale)
