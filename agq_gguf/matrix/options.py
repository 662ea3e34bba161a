"""How one matrix is quantized."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixOptions:
    """How one matrix is quantized; the defaults are what measured best."""

    activation_bits: int = 8
    activation_scale: str = "rotated"  # one of blocks.ACTIVATION_SCALES
    refine: bool = True  # exponents and channel order
    learn_codebook: bool = True
    error_feedback: bool = True
    damping: float = 0.01  # of the Hessian, as a share of its mean diagonal
    sweeps: int = 6  # of coordinate descent after error feedback
    equalize: bool = True  # move factors from norms into the matrices behind (the caller does it: `equalize`)

    @property
    def rotated(self) -> bool:
        """Whether groups are stored rotated."""
        return self.activation_scale == "rotated"
