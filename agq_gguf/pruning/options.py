"""What a user can choose about pruning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agq_gguf.errors import InputError
from agq_gguf.format import pruning_record
from agq_gguf.pruning.plan import (
    Plan,
)


@dataclass(frozen=True)
class PruneOptions:
    """What a user can choose."""

    share: float = 0.3  # of the prompt's work that is to be saved; 0: remove the records
    score: str | None = None  # None: `recent` or `learned`, as the calibration finds
    keep: int | None = None  # None: what suits the score
    reach: int | None = None  # the same
    reuse: bool | None = None  # None: the calibration chooses
    layers: tuple[int, ...] | None = None  # None: the calibration chooses
    max_layers: int = 3
    candidates: int = 6  # layers that are tried
    prompts: int = 16
    following: int = 64  # tokens behind a prompt
    curve: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    threads: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for what makes no sense."""
        if not 0 <= self.share <= 0.9:
            raise InputError(f"a share of {self.share} cannot be saved; wanted is 0 to 0.9")
        if self.score is not None and self.score not in pruning_record.SCORES:
            raise InputError(f"unknown score {self.score!r}; known are {', '.join(pruning_record.SCORES)}")
        if (
            not 0 <= (self.keep or 0) <= pruning_record.MAX_KEEP
            or not 0 <= (self.reach or 0) <= pruning_record.MAX_REACH
        ):
            raise InputError(
                f"keep can be 0 to {pruning_record.MAX_KEEP} tokens, reach 0 to {pruning_record.MAX_REACH}"
            )

    def plan(self, *thresholds: tuple[int, float]) -> Plan:
        """With these thresholds by layer."""
        score = pruning_record.score_named(self.score or Plan.score)
        return Plan(
            thresholds,
            score.name,
            score.keep if self.keep is None else self.keep,
            score.reach if self.reach is None else self.reach,
            bool(self.reuse),
        )

    def ways(self) -> list[PruneOptions]:
        """What is left open, decided in each way that is worth a try."""
        scores = [s for s in pruning_record.SCORE_TABLE if (s.name == self.score if self.score else s.is_tried)]
        reuse = (False, True) if self.reuse is None else (self.reuse,)
        # A learned direction says what the states of dropped tokens are still good for: without reuse it is no use.
        tried = [(s.name, again) for s in scores for again in reuse if not s.has_direction or again or len(reuse) == 1]
        return [replace(self, score=name, reuse=again) for name, again in tried]
