"""The command `import-hf`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Quiet
from agq_gguf.errors import HostError


class OutType(str, Enum):
    """Values of --outtype."""

    f16 = "f16"
    bf16 = "bf16"
    f32 = "f32"


def import_hf(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT_DIR", help="Folder with config.json and weights.", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="GGUF file to write; replaced when all went well.", show_default=False)
    ],
    outtype: Annotated[OutType, typer.Option(help="Type of the matrices.")] = OutType.f16,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Run the code in PyTorch files; only if you trust their author.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Import a Hugging Face checkpoint of LLaMA, OPT or BLOOM as a float GGUF.

    Stock llama.cpp runs the result, and `quantize` takes it. For all other models use convert_hf_to_gguf.py of
    llama.cpp.
    """
    try:
        from agq_gguf.import_hf import import_checkpoint
    except ImportError as e:
        raise HostError(f"importing needs {e.name}: pip install 'agq-gguf[convert]'") from e
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
