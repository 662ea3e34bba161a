"""The command `verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Quiet
from agq_gguf.errors import EditedError, FormatError


def verify(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="AGQ4 file, or any part of a split file.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check that a model is exactly what quantize wrote.

    Reads the whole file and compares every tensor and the metadata with the digests stored in it. If only the metadata
    was edited, the exit code is 6.
    """
    from agq_gguf.inspection.verify import verify as run

    with show.ProgressView(quiet=quiet or as_json) as view:
        found = run(model, view.update)
    if as_json:
        show.write_json({"model": str(model), **asdict(found)})
    if found.only_edited:
        raise EditedError(
            f"{model}: the metadata was edited; all {found.tensors} tensors are intact ({show.size(found.bytes)}). "
            "If you did not edit it, make or download the file again"
        )
    if found.problems:
        for problem in found.problems if not as_json else ():
            show.complain(problem)
        raise FormatError(f"{model}: damaged ({len(found.problems)} problems); make or download it again")
    if not as_json:
        show.say(f"{model}: intact ({found.tensors} tensors, {show.size(found.bytes)})")
