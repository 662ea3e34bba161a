"""Options for quantizing one matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatrixOptions:
    """Options for quantizing one matrix; the defaults measured best."""

    activation_bits: int = 8
    activation_scale: str = "rotated"  # one of blocks.ACTIVATION_SCALES
    refine: bool = True  # exponents and channel order
    learn_codebook: bool = True
    error_feedback: bool = True
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean
    sweeps: int = 6  # rounds of coordinate descent after error feedback
    equalize: bool = True  # move factors from norms into the matrices that follow (done by the caller, see `equalize`)

    @property
    def rotated(self) -> bool:
        """Whether groups are stored rotated."""
        return self.activation_scale == "rotated"
