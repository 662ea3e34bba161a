"""The command `import-hf`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Quiet
from agq_gguf.errors import missing_package


class OutType(str, Enum):
    """Values of --outtype."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


def import_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT_DIR", help="Folder with config.json and the weights.", show_default=False),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="GGUF file to write; replaced only when complete.", show_default=False),
    ],
    outtype: Annotated[OutType, typer.Option(help="Type of the matrices in the file.")] = OutType.f16,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Run the code in PyTorch files; only if you trust their author.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Hugging Face checkpoint to a float GGUF.

    Supports LLaMA, OPT and BLOOM, in floats or packed (GPTQ, AWQ, AutoRound, compressed-tensors). Stock llama.cpp runs
    the result, and `quantize` accepts it. For all other models use llama.cpp's convert_hf_to_gguf.py.
    """
    try:
        from agq_gguf.import_hf import import_checkpoint
    except ImportError as e:
        raise missing_package("importing", e, "convert") from e
    with show.ProgressView(quiet=quiet) as view:
        report = import_checkpoint(
            checkpoint, target, outtype=outtype.value, allow_pickle=allow_pickle, progress=view.update
        )
    show.say(
        f"{target}: {report.architecture}, {report.n_parameters / 1e6:.1f} million parameters in {report.n_tensors} "
        f"tensors, {show.size(report.n_bytes)}"
    )
    for warning in report.warnings:
        show.complain(f"warning: {warning}")
