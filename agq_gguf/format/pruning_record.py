"""The pruning record inside the attribute stream of an AGQ4 matrix."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import FormatError

MAX_KEEP, MAX_REACH = 255, 15  # of a pruning record
MAX_HEADS, MAX_TAIL = 16, 63  # of the score `heads`


@dataclass(frozen=True)
class Score:
    """A way to measure the importance of a token (docs/pruning.md); cpp/scores computes it."""

    name: str
    keep: int = 64  # tokens at the end of a prompt that always stay, if the user does not say
    reach: int = 2  # how far the importance of a token spreads to its neighbours, if the user does not say
    is_tried: bool = False  # by calibration, if the user names no score
    has_direction: bool = False  # learned by calibration and stored in the record
    has_heads: bool = False  # chosen by calibration and stored in the record


# The position in this table is what files store.
SCORE_TABLE = (
    Score("first"),
    Score("received"),
    Score("recent", is_tried=True),
    Score("learned", keep=32, reach=0, is_tried=True, has_direction=True),
    Score("heads", keep=32, reach=5, has_heads=True),
)
SCORES = tuple(score.name for score in SCORE_TABLE)
_BY_NAME = {score.name: score for score in SCORE_TABLE}


def score_named(name: str) -> Score:
    """The score of this name. Raises FormatError if there is none."""
    if name not in _BY_NAME:
        raise FormatError(f"the pruning score is {name!r}; known scores are {', '.join(SCORES)}")
    return _BY_NAME[name]


RECORD = struct.Struct("<BBBBf")


DIRECTION = struct.Struct("<fHH")  # factor, number of channels, 0; followed by a signed byte for each channel


@dataclass(frozen=True)
class Direction:
    """The vector factor * codes; a learned score is its product with the state of a token."""

    factor: float  # finite, >= 0; rounded to binary32
    codes: tuple[int, ...]  # one for each channel of the state, -128..127

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Direction:
        """The nearest storable direction."""
        factor = float(np.float32(np.abs(values).max(initial=0) / 127))
        codes = np.rint(values / factor) if factor else np.zeros(len(values))
        return cls(factor, tuple(codes.clip(-127, 127).astype(int).tolist()))

    def to_bytes(self) -> bytes:
        """The direction as the file stores it."""
        return DIRECTION.pack(self.factor, len(self.codes), 0) + np.array(self.codes, np.int8).tobytes()

    def values(self) -> NDArray[np.float32]:
        """The direction as numbers [E]."""
        return np.float32(self.factor) * np.array(self.codes, np.float32)


HEADS = struct.Struct("<BBH")  # number of heads, tail, 0; followed by the heads
HEAD = struct.Struct("<HH")  # layer, head
_NO_OVERLAP = 255  # in place of the tail


@dataclass(frozen=True)
class Heads:
    """What the score `heads` looks at: attention heads, and perhaps the words of the question."""

    heads: tuple[tuple[int, int], ...]  # (layer, query head of this layer); layers up to the pruning layer
    tail: int | None = None  # tokens behind the question at the end of a prompt; None: its words do not count

    def to_bytes(self) -> bytes:
        """The heads as the file stores them."""
        tail = _NO_OVERLAP if self.tail is None else self.tail
        return HEADS.pack(len(self.heads), tail, 0) + b"".join(HEAD.pack(*head) for head in self.heads)

    def spec(self) -> str:
        """The heads as AGQ_PRUNE has them, such as 10.3+9.12."""
        return "+".join(f"{layer}.{head}" for layer, head in self.heads)


@dataclass(frozen=True)
class Pruning:
    """The pruning record: after this layer's attention, drop prompt tokens with importance below the threshold."""

    score: str  # one of SCORES
    threshold: float  # finite, >= 0; rounded to binary32
    keep: int = 0  # the last N tokens of a call are never dropped; 0..255
    reach: int = 0  # each token gets the highest importance within N places; 0..15
    reuse: bool = (
        False  # later layers still get keys and values of dropped tokens, from the state when they were dropped
    )
    direction: Direction | None = None  # only for scores with a direction
    heads: Heads | None = None  # only for the score `heads`

    def to_bytes(self) -> bytes:
        """The record as the attribute stream has it. The values must have passed `check_pruning`."""
        score = SCORES.index(self.score)
        fixed = RECORD.pack(score, self.keep, self.reach, self.reuse, self.threshold)
        return fixed + b"".join(part.to_bytes() for part in (self.direction, self.heads) if part is not None)


def pruning_bytes(channels: int = 0, heads: int = 0) -> int:
    """Bytes of a pruning record with a direction of so many channels (0: none) or so many heads (0: none)."""
    direction = DIRECTION.size + channels if channels else 0
    return RECORD.size + direction + (HEADS.size + heads * HEAD.size if heads else 0)


def check_pruning(pruning: Pruning) -> None:
    """Raises FormatError unless every value of the record can be stored."""
    score = score_named(pruning.score)
    with np.errstate(over="ignore"):
        threshold = np.float32(pruning.threshold)
    if not (np.isfinite(threshold) and threshold >= 0):
        raise FormatError(f"the pruning threshold must be finite and >= 0, got {threshold}")
    if not 0 <= pruning.keep <= MAX_KEEP:
        raise FormatError(f"pruning must keep the last 0 to {MAX_KEEP} tokens, got {pruning.keep}")
    if not 0 <= pruning.reach <= MAX_REACH:
        raise FormatError(f"the pruning reach must be 0 to {MAX_REACH}, got {pruning.reach}")
    if (pruning.direction is not None) != score.has_direction:
        wanted = "needs a direction" if score.has_direction else "has no direction"
        raise FormatError(f"the pruning score {pruning.score!r} {wanted}")
    if pruning.direction is not None:
        _check_direction(pruning.direction)
    if (pruning.heads is not None) != score.has_heads:
        raise FormatError(f"the pruning score {pruning.score!r} {'needs' if score.has_heads else 'has no'} heads")
    if pruning.heads is not None:
        _check_heads(pruning.heads)


def _check_heads(chosen: Heads) -> None:
    if not 1 <= len(chosen.heads) <= MAX_HEADS:
        raise FormatError(f"pruning must look at 1 to {MAX_HEADS} heads, got {len(chosen.heads)}")
    if not all(0 <= number < 1 << 16 for head in chosen.heads for number in head):
        raise FormatError(f"the layer and number of a head must be 0 to 65535, got {chosen.spec()}")
    if not 0 <= (chosen.tail or 0) <= MAX_TAIL:
        raise FormatError(f"the tail behind the question must be 0 to {MAX_TAIL} tokens, got {chosen.tail}")


def _check_direction(direction: Direction) -> None:
    with np.errstate(over="ignore"):
        factor = np.float32(direction.factor)
    if not (np.isfinite(factor) and factor >= 0):
        raise FormatError(f"the factor of the pruning direction must be finite and >= 0, got {factor}")
    if not 1 <= len(direction.codes) < 1 << 16:
        raise FormatError(f"the pruning direction must have 1 to 65535 channels, got {len(direction.codes)}")
    if not all(-128 <= code <= 127 for code in direction.codes):
        raise FormatError("the numbers of the pruning direction must be -128 to 127")


def decode_pruning(record: bytes) -> Pruning:
    """The pruning record at the beginning of `record`, the rest of the parameters; the caller checks the length."""
    if len(record) < RECORD.size:
        raise FormatError(f"the pruning record needs {RECORD.size} bytes, got {len(record)}")
    score, keep, reach, flags, threshold = RECORD.unpack_from(record)
    if score >= len(SCORES) or flags > 1:
        raise FormatError(f"unknown pruning record (score {score}, flags {flags})")
    more, of_score = record[RECORD.size :], SCORE_TABLE[score]
    direction = _decode_direction(more) if of_score.has_direction else None
    heads = _decode_heads(more) if of_score.has_heads else None
    return Pruning(SCORES[score], threshold, keep, reach, bool(flags), direction, heads)


def _decode_heads(data: bytes) -> Heads:
    if len(data) < HEADS.size:
        raise FormatError("the pruning record ends before its heads: the file is damaged")
    n, tail, zero = HEADS.unpack_from(data)
    listed = data[HEADS.size : HEADS.size + n * HEAD.size]
    if zero or not 1 <= n <= MAX_HEADS or len(listed) != n * HEAD.size or (tail > MAX_TAIL and tail != _NO_OVERLAP):
        raise FormatError(
            f"the heads of the pruning record are not valid ({n} heads, tail {tail}): the file is damaged"
        )
    return Heads(tuple(HEAD.iter_unpack(listed)), None if tail == _NO_OVERLAP else tail)


def _decode_direction(data: bytes) -> Direction:
    if len(data) < DIRECTION.size:
        raise FormatError("the pruning record ends before its direction: the file is damaged")
    factor, n, zero = DIRECTION.unpack_from(data)
    codes = np.frombuffer(data[DIRECTION.size : DIRECTION.size + n], np.int8)
    if zero or len(codes) != n:
        raise FormatError(f"the pruning direction must have {n} channels and then zero, got {len(codes)} and {zero}")
    return Direction(factor, tuple(codes.tolist()))
