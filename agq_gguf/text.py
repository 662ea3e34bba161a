"""Reads the texts for calibration, evaluation, pruning and reports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agq_gguf.arguments import Text
from agq_gguf.errors import InputError

DATA = Path(__file__).parent / "data"
PACKAGED_CALIBRATION = DATA / "calibration.txt"
PACKAGED_EVALUATION = DATA / "evaluation.txt"

_T = TypeVar("_T")

# First bytes of files that are not UTF-8 text. UTF-32 comes before UTF-16, whose mark begins a mark of UTF-32.
_SIGNATURES = (
    (b"\xff\xfe\x00\x00", "UTF-32 text; convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text; convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "gzip data; unpack it first, for example with gunzip"),
    (b"BZh", "bzip2 data; unpack it first, for example with bunzip2"),
    (b"\xfd7zXZ\x00", "xz data; unpack it first, for example with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd data; unpack it first, for example with unzstd"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"PAR1", "a Parquet file; export its text column as a UTF-8 text file"),
    (b"%PDF", "a PDF document; export its text as a UTF-8 text file"),
    (b"GGUF", "a GGUF model; give a text file here"),
)


@dataclass(frozen=True)
class Dialogue:
    """A conversation. A model reads it in its own chat template, or as plain text if it has none."""

    turns: tuple[tuple[str, str], ...]  # role ("system", "user" or "assistant") and content

    @property
    def plain(self) -> str:
        """The conversation without a template."""
        return "".join(f"{role.capitalize()}: {content}\n\n" for role, content in self.turns)


Piece = str | Dialogue


@dataclass(frozen=True)
class LoadedText:
    """A text in memory; iterating gives its pieces. Several stages can use it although a pipe can be read only once."""

    name: str  # for messages: the file's name, or "text"
    parts: tuple[tuple[Piece, ...], ...]  # several texts, which get equal shares of the tokens as far as they are long
    optional: bool = False  # whether work goes on without it if the model cannot read a text

    def __iter__(self) -> Iterator[str]:
        for part in self.parts:
            for piece in part:
                yield piece if isinstance(piece, str) else piece.plain

    @property
    def whole(self) -> str:
        """All pieces as one string."""
        return "".join(self)


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a UTF-8 text file, without a byte-order mark.

    Raises InputError if the file cannot be read, is empty or is not UTF-8 text; the message says what was found.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path}: the text cannot be read: {e.strerror}") from e
    for signature, what in _SIGNATURES:
        if raw.startswith(signature):
            raise InputError(f"{path}: expected UTF-8 text, found {what}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        found = raw[e.start]
        raise InputError(
            f"{path}: not UTF-8 text: byte {e.start} is 0x{found:02X}; convert the file to UTF-8 first"
        ) from e
    if (zero := raw.find(b"\0")) >= 0:
        raise InputError(
            f"{path}: not a text: byte {zero} is zero, as in a binary file or in UTF-16 without a byte-order mark; "
            "give a UTF-8 text file"
        )
    if not text.strip():
        raise InputError(f"{path}: the text is empty")
    return text


def load_text(source: Text) -> LoadedText:
    """Reads a text file, or collects strings of text. Raises InputError like `read_text`."""
    if isinstance(source, LoadedText):
        return source
    if isinstance(source, (str, os.PathLike)):
        return LoadedText(Path(source).name, ((read_text(source),),))
    return LoadedText("text", (tuple(source),))


def mix_texts(*sources: Text) -> LoadedText:
    """Several texts as one, which get equal shares of the tokens as far as they are long.

    A source is the path of a text file, strings of text, or what `load_text`, `mix_texts` or `default_calibration`
    returned. Raises InputError like `read_text`.
    """
    loaded = [load_text(source) for source in sources]
    return LoadedText(" + ".join(text.name for text in loaded), tuple(part for text in loaded for part in text.parts))


def fair_shares(available: Sequence[int], wanted: int) -> list[int]:
    """Divides `wanted` units equally. What one source does not have, the longer ones give."""
    shares = [0] * len(available)
    order = sorted(range(len(available)), key=lambda i: available[i])
    for done, i in enumerate(order):
        shares[i] = min(available[i], wanted // (len(order) - done))
        wanted -= shares[i]
    return shares


def interleaved(lists: Sequence[Sequence[_T]], sizes: Sequence[Sequence[int]] | None = None) -> list[_T]:
    """Merges lists so that after any number of items, each list has given about the same fraction of its content.

    `sizes` are those of the items; without them all items of a list count alike. Each list keeps its order.
    """
    placed = []
    for i, items in enumerate(lists):
        own = sizes[i] if sizes else [1] * len(items)
        total, before = sum(own), 0
        for j, (item, size) in enumerate(zip(items, own, strict=True)):
            placed.append(((before + size / 2) / total, i, j, item))
            before += size
    return [item for *_, item in sorted(placed, key=lambda found: found[:3])]
