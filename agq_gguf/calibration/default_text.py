"""The calibration text in the package, for models that are quantized without a text of the user.

It is a mixture of what models read: prose in many languages, encyclopedic articles, programs, manuals, mathematics and
dialogues. Runs of one kind alternate, so that any larger part of it is about as varied as the whole.
`agq_gguf/data/default-calibration/ORIGINS.md` says where each file comes from.
"""

from __future__ import annotations

import json
from pathlib import Path

from agq_gguf.errors import InputError
from agq_gguf.text import DATA, Dialogue, LoadedText, Piece, interleaved, read_text

FOLDER = DATA / "default-calibration"
NAME = "the default text"
_PIECE = 1500  # minimum characters of a piece
# Minimum bytes of one kind in a row, about three chunks of 512 tokens, so that most chunks hold only one kind, as a
# text that models read would. Chunks of mixed kinds give worse statistics (docs/research/quality.md).
_RUN = 6000


def default_calibration() -> LoadedText:
    """The text that `agq-gguf quantize` uses if none is given. Pass it as `calibration`.

    If the model has a chat template, the dialogues in the text are rendered with it. A model that cannot read a text
    (one without a tokenizer) is quantized without calibration, with a warning. Raises InputError if the package is
    incomplete.
    """
    kinds = sorted(path for path in FOLDER.glob("*") if path.is_dir())
    if not kinds:
        raise InputError(f"{FOLDER}: the default calibration text is missing; install agq-gguf again")
    runs = [_runs(_alternating([read_pieces(file) for file in sorted(kind.iterdir())])) for kind in kinds]
    ordered = interleaved(runs, [[sum(map(_size, run)) for run in own] for own in runs])
    return LoadedText(NAME, (tuple(piece for run in ordered for piece in run),), optional=True)


def held_out(every: int = 6) -> tuple[LoadedText, LoadedText]:
    """The default text in two: what calibrates, and every sixth piece, to measure on. Raises InputError as above."""
    pieces = default_calibration().parts[0]
    learn = tuple(piece for i, piece in enumerate(pieces) if i % every != every - 1)
    return (
        LoadedText(f"{NAME} (five sixths)", (learn,)),
        LoadedText(f"{NAME} (the other sixth)", (pieces[every - 1 :: every],)),
    )


def _alternating(lists: list[list[Piece]]) -> list[Piece]:
    return interleaved(lists, [[_size(piece) for piece in pieces] for pieces in lists])


def _runs(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in runs of at least `_RUN` bytes; the last one may be shorter."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        if runs and sum(map(_size, runs[-1])) < _RUN:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _size(piece: Piece) -> int:
    return len((piece if isinstance(piece, str) else piece.plain).encode())


def read_pieces(file: Path) -> list[Piece]:
    """The dialogues of a .json file, or the paragraphs of a text in groups of at least 1500 characters."""
    if file.suffix == ".json":
        dialogues = json.loads(read_text(file))
        return [Dialogue(tuple((turn["role"], turn["content"]) for turn in dialogue)) for dialogue in dialogues]
    pieces: list[str] = []
    for paragraph in read_text(file).strip("\n").split("\n\n"):
        if pieces and len(pieces[-1]) < _PIECE:
            pieces[-1] += f"{paragraph}\n\n"
        else:
            pieces.append(f"{paragraph}\n\n")
    if len(pieces) > 1 and len(pieces[-1]) < _PIECE // 2:
        last = pieces.pop()
        pieces[-1] += last
    return list(pieces)
