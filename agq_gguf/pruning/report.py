"""The result of a calibration: the setting, what it was measured to save and to cost, and the metadata that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from agq_gguf.format import pruning_record
from agq_gguf.gguf_io.metadata import PRUNE_LAYERS, PRUNE_PREFIX

if TYPE_CHECKING:
    from agq_gguf.pruning.search import Point  # it loads torch, and who reads a file's record does not need that


@dataclass(frozen=True)
class Kept:
    """What a setting kept of the answers, by kind of prompt."""

    kinds: tuple[str, ...]
    asked: tuple[int, ...]  # prompts
    unpruned: tuple[int, ...]  # right answers without pruning
    right: tuple[int, ...]  # of these, right with it
    promised: float  # the share that was asked for
    saving: float  # share of the work of these prompts
    speed: float  # how many times as fast these prompts are read; measured, so it varies

    @classmethod
    def of(cls, value: Callable[[str], Any]) -> Kept:
        """From the metadata; `value` returns what the key ``agq.prune.answers.`` + name has.

        Raises TypeError or ValueError.
        """
        kinds = tuple(map(str, value("kinds")))
        asked, unpruned, right = (tuple(map(int, value(name))) for name in ("asked", "unpruned", "right"))
        if not len(kinds) == len(asked) == len(unpruned) == len(right):
            raise ValueError("the counts of answers do not match their kinds")
        promised, saving, speed = (float(value(name)) for name in ("promised", "saving", "speed"))
        return cls(kinds, asked, unpruned, right, promised, saving, speed)

    @property
    def share(self) -> float:
        """The share of right answers that are still right."""
        return sum(self.right) / max(sum(self.unpruned), 1)

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """The 95% interval of `share` (Wilson, 1927)."""
        n, p = max(sum(self.unpruned), 1), self.share
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


@dataclass(frozen=True)
class PruneReport:
    """Result of a calibration."""

    chosen: Point
    curve: list[Point]
    nll: float  # of the tokens that follow, without pruning
    origin: str  # the calibration text and prompts
    carriers: dict[int, str] = field(default_factory=dict)  # layer -> the tensor that holds its record
    kept: Kept | None = None  # without a share: the answers to questions about planted facts
    directions: dict[int, pruning_record.Direction] = field(default_factory=dict)  # of the score `learned`, by layer

    def records(self) -> dict[str, pruning_record.Pruning]:
        """The records of the setting, by tensor."""
        return {
            self.carriers[layer]: replace(record, direction=self.directions.get(layer))
            for layer, record in self.chosen.plan.records().items()
        }


def metadata_of(report: PruneReport) -> dict[str, Any]:
    """The keys ``agq.prune.*``: a readable copy of the records in the tensors, and the curve of savings."""
    plan, curve = report.chosen.plan, report.curve
    return {
        f"{PRUNE_PREFIX}score": plan.score,
        f"{PRUNE_PREFIX}keep": plan.keep,
        f"{PRUNE_PREFIX}reach": plan.reach,
        f"{PRUNE_PREFIX}reuse": int(plan.reuse),
        PRUNE_LAYERS: np.array(plan.layers, np.int32),
        f"{PRUNE_PREFIX}thresholds": np.array([value for _, value in plan.thresholds], np.float32),
        f"{PRUNE_PREFIX}saving": report.chosen.saving,
        f"{PRUNE_PREFIX}calibration": report.origin,
        f"{PRUNE_PREFIX}nll": report.nll,
        f"{PRUNE_PREFIX}curve.saving": np.array([p.saving for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.kl": np.array([p.kl for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.nll": np.array([p.nll for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.echo_kl": np.array([p.echo_kl for p in curve], np.float32),
        f"{PRUNE_PREFIX}curve.thresholds": np.array([v for p in curve for _, v in p.plan.thresholds], np.float32),
    } | ({} if report.kept is None else _answers_of(report.kept))


def _answers_of(kept: Kept) -> dict[str, Any]:
    """The keys ``agq.prune.answers.*``."""
    prefix = f"{PRUNE_PREFIX}answers."
    return {
        f"{prefix}kinds": list(kept.kinds),
        f"{prefix}asked": np.array(kept.asked, np.int32),
        f"{prefix}unpruned": np.array(kept.unpruned, np.int32),
        f"{prefix}right": np.array(kept.right, np.int32),
        f"{prefix}promised": kept.promised,
        f"{prefix}saving": kept.saving,
        f"{prefix}speed": kept.speed,
    }
