"""Options of pruning calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agq_gguf.errors import InputError
from agq_gguf.format import pruning_record
from agq_gguf.pruning.plan import (
    Plan,
)

_OF_A_SHARE = ("score", "keep", "reach", "reuse", "layers")  # options that only a share has


@dataclass(frozen=True)
class PruneOptions:
    """Options of pruning calibration. Raises InputError for values that are not supported."""

    share: float | None = None  # of a prompt's work to save; 0: remove the records; None: as much as `answers` allows
    answers: float = 0.95  # without a share: the part of the model's right answers that must stay right
    overlap: bool = False  # without a share: words of the question count, too; this saves more, and misses paraphrases
    score: str | None = None  # with a share; None: the better of `recent` and `learned`
    keep: int | None = None  # the last tokens that are never dropped; None: the score's default
    reach: int | None = None  # places within which a token gets the highest importance; None: the score's default
    reuse: bool | None = None  # None: the calibration chooses
    layers: tuple[int, ...] | None = None  # None: the calibration chooses
    max_layers: int = 3
    candidates: int = 6  # number of layers to try
    prompts: int | None = None  # None: 16 with a share, 96 without
    following: int = 64  # tokens after a prompt
    curve: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= (self.share or 0) <= 0.9:
            raise InputError(f"the share of work to save must be 0 to 0.9, got {self.share}")
        if not 0 < self.answers <= 1:
            raise InputError(f"the part of the answers to keep must be above 0 and at most 1, got {self.answers}")
        if self.share is None and (named := [name for name in _OF_A_SHARE if getattr(self, name) is not None]):
            raise InputError(f"the option {named[0]} needs a share of the work to save; give one with --share")
        if self.score is not None and self.score not in pruning_record.SCORES:
            raise InputError(f"score must be one of {', '.join(pruning_record.SCORES)}, got {self.score!r}")
        if self.score is not None and pruning_record.score_named(self.score).has_heads:
            raise InputError(f"the score {self.score!r} is calibrated by answers; leave out the share and the score")
        if not 0 <= (self.keep or 0) <= pruning_record.MAX_KEEP:
            raise InputError(f"keep must be 0 to {pruning_record.MAX_KEEP} tokens, got {self.keep}")
        if not 0 <= (self.reach or 0) <= pruning_record.MAX_REACH:
            raise InputError(f"reach must be 0 to {pruning_record.MAX_REACH} places, got {self.reach}")

    @property
    def saved(self) -> float:
        """The share of the work to save, which must have been given."""
        assert self.share is not None
        return self.share

    def plan(self, *thresholds: tuple[int, float]) -> Plan:
        """The plan with these options and (layer, threshold) pairs."""
        score = pruning_record.score_named(self.score or Plan.score)
        return Plan(
            thresholds,
            score.name,
            score.keep if self.keep is None else self.keep,
            score.reach if self.reach is None else self.reach,
            bool(self.reuse),
        )

    def ways(self) -> list[PruneOptions]:
        """These options with the open choices (score, reuse) made in each way worth trying."""
        scores = [s for s in pruning_record.SCORE_TABLE if (s.name == self.score if self.score else s.is_tried)]
        reuse = (False, True) if self.reuse is None else (self.reuse,)
        # A learned direction rates how well the states of dropped tokens can be reused; it does not help without reuse.
        tried = [(s.name, again) for s in scores for again in reuse if not s.has_direction or again or len(reuse) == 1]
        return [replace(self, score=name, reuse=again) for name, again in tried]
