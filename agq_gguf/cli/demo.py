"""The commands `demo` and `backend-path`."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Json, Quiet, Threads
from agq_gguf.errors import OutputError
from agq_gguf.gguf_io.writer import check_writable

if TYPE_CHECKING:
    from agq_gguf.demo import Demonstration


def backend_path() -> None:
    """Print the path of the plugin.

    Set GGML_BACKEND_PATH to it, and llama-bench, llama-cli and llama-server load the plugin.
    """
    from agq_gguf.native import backend_path as locate

    show.say(str(locate()))


def demo(
    keep: Annotated[Path | None, typer.Option(help="Keep the models in this folder.", show_default=False)] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a small model, run it, compare it with Q4_0.

    The model is part of this package. Q4_0 is llama.cpp's own 4-bit type, made from the same file.
    """
    from agq_gguf import demo as demonstration

    if keep is not None:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"{keep}: cannot create this folder: {e.strerror}") from e
        check_writable(keep / "model.gguf")
    with (
        tempfile.TemporaryDirectory(prefix="agq-gguf-") if keep is None else nullcontext(str(keep)) as folder,
        show.ProgressView(quiet=quiet or as_json) as view,
    ):
        shown = demonstration.run(Path(folder), threads=threads, progress=view.update)
    if as_json:
        show.write_json(asdict(shown))
        return
    show_demonstration(shown)
    if keep is not None:
        show.say(f"the models are in {keep}")


def show_demonstration(shown: Demonstration) -> None:
    """Prints the generated text and the table of results."""
    show.say(f"\nThe AGQ4 model continues {shown.prompt!r}:\n\n{shown.text}\n")
    show.table(
        ["model", ">file", ">bits per weight", ">KL to F16", ">perplexity", ">prompt tokens/s", ">generation tokens/s"],
        [
            [
                row.name,
                show.size(row.file_bytes),
                f"{row.bits_per_weight:.2f}",
                f"{row.mean_kl:.5f}",
                f"{row.perplexity:.3f}",
                f"{row.prompt_speed:.0f}",
                f"{row.generation_speed:.0f}",
            ]
            for row in shown.rows
        ],
    )
