"""The pruning record inside the attribute stream of an AGQ4 matrix."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError

MAX_KEEP, MAX_REACH = 255, 15  # of a pruning record


@dataclass(frozen=True)
class Score:
    """A way to measure the importance of a token (docs/pruning.md); cpp/scores computes it."""

    name: str
    keep: int = 64  # tokens at the end of a prompt that always stay, if the user does not say
    reach: int = 2  # how far the importance of a token spreads to its neighbours, if the user does not say
    is_tried: bool = False  # by calibration, if the user names no score
    has_direction: bool = False  # learned by calibration and stored in the record


# The position in this table is what files store.
SCORE_TABLE = (
    Score("first"),
    Score("received"),
    Score("recent", is_tried=True),
    Score("learned", keep=32, reach=0, is_tried=True, has_direction=True),
)
SCORES = tuple(score.name for score in SCORE_TABLE)
_BY_NAME = {score.name: score for score in SCORE_TABLE}


def score_named(name: str) -> Score:
    """The score of this name. Raises FormatError if there is none."""
    if name not in _BY_NAME:
        raise FormatError(f"the pruning score is {name!r}; known scores are {', '.join(SCORES)}")
    return _BY_NAME[name]


RECORD = struct.Struct("<BBBBf")


DIRECTION = struct.Struct("<fHH")  # factor, number of channels, 0; behind it a signed byte for each


@dataclass(frozen=True)
class Direction:
    """What a learned score multiplies the state of a token with: factor * codes."""

    factor: float  # finite, >= 0; rounded to binary32
    codes: tuple[int, ...]  # one for each channel of the state, -128..127

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Direction:
        """The nearest one that can be stored."""
        factor = float(np.float32(np.abs(values).max(initial=0) / 127))
        codes = np.rint(values / factor) if factor else np.zeros(len(values))
        return cls(factor, tuple(codes.clip(-127, 127).astype(int).tolist()))

    def values(self) -> NDArray[np.float32]:
        """The numbers that stand for it."""
        return np.float32(self.factor) * np.array(self.codes, np.float32)


@dataclass(frozen=True)
class Pruning:
    """The pruning record: behind this layer's attention, drop prompt tokens whose importance is below the threshold."""

    score: str  # one of SCORES
    threshold: float  # finite, >= 0; rounded to binary32
    keep: int = 0  # the last so many tokens of a call always stay; 0..255
    reach: int = 0  # a token counts as much as the best one at most so many places away; 0..15
    reuse: bool = False  # later layers still get keys and values of dropped tokens, from the state in which they left
    direction: Direction | None = None  # of the score `learned`, and of no other

    @property
    def n_bytes(self) -> int:
        """Of the attribute stream."""
        return RECORD.size + (DIRECTION.size + len(self.direction.codes) if self.direction else 0)


def pruning_bytes(channels: int = 0) -> int:
    """Bytes of a pruning record: with a direction over so many channels, or without one."""
    return RECORD.size + (DIRECTION.size + channels if channels else 0)


def check_pruning(pruning: Pruning) -> None:
    """Raises FormatError unless every value of the record can be stored."""
    score = score_named(pruning.score)
    with np.errstate(over="ignore"):
        threshold = np.float32(pruning.threshold)
    if not (np.isfinite(threshold) and threshold >= 0):
        raise FormatError(f"the threshold for pruning is {threshold}, it must be finite and >= 0")
    if not 0 <= pruning.keep <= MAX_KEEP:
        raise FormatError(f"pruning is to keep the last {pruning.keep} tokens, the most are {MAX_KEEP}")
    if not 0 <= pruning.reach <= MAX_REACH:
        raise FormatError(f"the reach of importance for pruning is {pruning.reach}, the largest is {MAX_REACH}")
    if (pruning.direction is not None) != score.has_direction:
        wanted = "needs a direction" if score.has_direction else "has no direction"
        raise FormatError(f"the pruning score {pruning.score!r} {wanted}")
    if pruning.direction is not None:
        _check_direction(pruning.direction)


def _check_direction(direction: Direction) -> None:
    with np.errstate(over="ignore"):
        factor = np.float32(direction.factor)
    if not (np.isfinite(factor) and factor >= 0):
        raise FormatError(f"the factor of the direction for pruning is {factor}, it must be finite and >= 0")
    if not 1 <= len(direction.codes) < 1 << 16:
        raise FormatError(f"the direction for pruning has {len(direction.codes)} channels, it can have 1 to 65535")
    if not all(-128 <= code <= 127 for code in direction.codes):
        raise FormatError("a number of the direction for pruning does not fit into a signed byte")


def decode_pruning(record: bytes) -> Pruning:
    """The record that the rest of the parameters begins with; the caller compares the lengths."""
    if len(record) < RECORD.size:
        raise FormatError(f"the pruning record has {len(record)} bytes, it needs {RECORD.size}")
    score, keep, reach, flags, threshold = RECORD.unpack_from(record)
    if score >= len(SCORES) or flags > 1:
        raise FormatError(f"unknown pruning record (score {score}, flags {flags})")
    direction = _decode_direction(record[RECORD.size :]) if SCORE_TABLE[score].has_direction else None
    return Pruning(SCORES[score], threshold, keep, reach, bool(flags), direction)


def _decode_direction(data: bytes) -> Direction:
    if len(data) < DIRECTION.size:
        raise FormatError("the pruning record ends before its direction")
    factor, n, zero = DIRECTION.unpack_from(data)
    codes = np.frombuffer(data[DIRECTION.size : DIRECTION.size + n], np.int8)
    if zero or len(codes) != n:
        raise FormatError(f"the direction for pruning announces {n} channels, has {len(codes)}")
    return Direction(factor, tuple(codes.tolist()))
