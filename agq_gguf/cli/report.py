"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.files import check_output, write_text
from agq_gguf.cli.options import Quiet, Threads
from agq_gguf.errors import missing_package


def report(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="GGUF file, preferably of type AGQ4.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Page to write; default: the model's name with .html.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to run through the model; default: the one in the package.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="Tokens of the text to run; 0: do not run the model.")] = 2048,
    bench: Annotated[
        list[Path] | None, typer.Option(help="Output of `bench --json`; may be repeated.", show_default=False)
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--evaluate", help="Output of `evaluate --json`; may be repeated.", show_default=False),
    ] = None,
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page about a model.

    It shows activations, outliers and their refinement, errors, sizes, speed and quality. The page is one file and
    needs no network.
    """
    try:
        from agq_gguf.inspection.report import gather
        from agq_gguf.inspection.report_page import render
    except ImportError as e:
        raise missing_package("the report", e, "report") from e
    target = output or Path(f"{model.name.removesuffix('.gguf')}.html")
    check_output(target, [model, text, *(bench or []), *(evaluation or [])])
    with show.ProgressView(quiet=quiet) as view:
        data = gather(
            model, text=text, tokens=tokens, threads=threads, bench=bench or [], evaluations=evaluation or [],
            progress=view.update,
        )  # fmt: skip
    page = render(data)
    write_text(target, page)
    show.say(f"{target}: {show.size(target.stat().st_size)}")
