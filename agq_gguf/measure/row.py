"""One file in a table that compares files: its size, how near it is to its source, and how fast it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One file; the source itself is a row, too."""

    name: str
    path: str
    file_bytes: int
    bits_per_weight: float
    mean_kl: float  # from the source, in nats per token; 0 for the source itself
    mean_kl_error: float  # standard error
    perplexity: float
    top1_agreement: float  # share of positions with the same most likely token
    prompt_speed: float | None = None  # tokens per second, median; None: not measured
    generation_speed: float | None = None

    @property
    def ours(self) -> bool:
        """Whether the file is AGQ4, by the name that `compare` gives it."""
        return self.name.startswith("agq4")
