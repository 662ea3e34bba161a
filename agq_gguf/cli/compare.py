"""The commands `compare` and `card`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.calibration.default_text import default_calibration, held_out
from agq_gguf.cli import output as show
from agq_gguf.cli.files import check_picture, write_text
from agq_gguf.cli.options import Flash, FlashOption, Json, PlotOption, Quality, Quiet, Threads
from agq_gguf.errors import OutputError, missing_package
from agq_gguf.text import load_text

if TYPE_CHECKING:
    from agq_gguf.comparison.result import Comparison


def compare(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="GGUF model in F32, F16 or BF16.", show_default=False)
    ],
    folder: Annotated[
        Path, typer.Option("-o", "--folder", help="Folder for the files and for what is finished.")
    ] = Path("comparison"),
    types: Annotated[
        str,
        typer.Option(
            help="What to make, separated by commas: llama.cpp's types, agq4: and a preset, or agq4: and a number of "
            "bits per weight such as agq4:5.0. Default: seven types of llama.cpp and the three presets.",
            show_default=False,
        ),
    ] = "",
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to measure on; must not be the calibration text. Default: a sixth of the text in the "
            "package, which then is left out of calibration.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text for AGQ4 and for the importance matrix of llama.cpp's types. Default: the text in the package.",
            show_default=False,
        ),
    ] = None,
    quality: Annotated[Quality, typer.Option(help="Quality of the AGQ4 files.")] = Quality.balanced,
    chunks: Annotated[int, typer.Option(min=0, help="Chunks of 512 tokens to measure on; 0: the whole text.")] = 0,
    prompt: Annotated[int, typer.Option("-p", "--prompt", min=1, help="Tokens in the prompt of the speed test.")] = 512,
    generation: Annotated[int, typer.Option("-n", "--generate", min=1, help="Tokens to generate in it.")] = 128,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=0, help="Speed tests of each file; 0: no speed test.")
    ] = 5,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="Whether the files stay in the folder at the end.")
    ] = True,
    threads: Threads = 0,
    flash_attention: FlashOption = Flash.auto,
    plot: PlotOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare sizes of a model: llama.cpp's types and AGQ4.

    Makes each file, with the same calibration text for all, and measures its divergence from MODEL. Then all files run
    in turn to measure their speed, which needs memory for all of them. Prints a table in Markdown. What is finished
    stays in the folder, so that a run that was stopped goes on where it stopped.
    """
    try:
        from agq_gguf.comparison.candidates import DEFAULT, candidates
        from agq_gguf.comparison.page import table
        from agq_gguf.comparison.picture import plot_comparison
        from agq_gguf.comparison.run import Setup
        from agq_gguf.comparison.run import compare as run
        from agq_gguf.quantization.options import QuantizeOptions
    except ImportError as e:
        raise missing_package("comparing", e, "convert") from e
    check_picture(plot, [source, text, calibration])
    options = QuantizeOptions(quality=quality.value, threads=threads)
    learn, measure = (default_calibration(), None) if text is not None else held_out()
    setup = Setup(
        candidates=candidates(types.split(",") if types else DEFAULT, options),
        calibration=load_text(calibration) if calibration is not None else learn,
        text=measure or load_text(text or ""),
        chunks=chunks or None,
        prompt=prompt,
        generation=generation,
        repetitions=repetitions,
        threads=threads,
        flash_attention=flash_attention.value,
        keep_files=keep,
    )
    with show.ProgressView(quiet=quiet or as_json) as view:
        found = run(source, folder, setup, view.update)
    if plot is not None:
        plot_comparison(found.rows, plot)
    if as_json:
        show.write_json(asdict(found))
        return
    show.say(table(found))


def card(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="AGQ4 file.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("README.md"),
    base_model: Annotated[
        str, typer.Option(help="Repository of the original, such as OWNER/NAME; default: what the file says.")
    ] = "",
    licence: Annotated[str, typer.Option("--license", help="Its licence; default: what the file says.")] = "",
    compared: Annotated[
        Path | None, typer.Option("--compare", help="Output of `compare --json`.", show_default=False)
    ] = None,
) -> None:
    """Write a model card for the Hugging Face hub.

    It is Markdown with YAML front matter: base model, licence, what the file is made of, how to run it, and what
    `compare` measured. An existing file is not replaced.
    """
    from agq_gguf.comparison.card import card as write
    from agq_gguf.comparison.result import read_comparison

    found: Comparison | None = read_comparison(compared) if compared is not None else None
    page = write(model, base_model=base_model, licence=licence, compared=found)
    try:
        write_text(output, page, new=True)
    except OutputError as e:
        raise OutputError(f"{e}; choose another file with -o") from e
    show.say(f"{output}: {show.size(output.stat().st_size)}")
