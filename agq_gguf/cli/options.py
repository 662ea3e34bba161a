"""Options that several commands share."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from agq_gguf.runtime.cpus import MAX_THREADS


def parse_size(text: str) -> int:
    """Bytes in a size such as ``4G``, ``512M``, ``1.5GiB`` or ``1000000``; units are binary."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    n_bytes = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if n_bytes <= 0:
        raise typer.BadParameter(f"expected a size such as 4G or 512M, got {text!r}")
    return n_bytes


class Quality(str, Enum):
    """Values of --quality."""

    fast = "fast"
    balanced = "balanced"
    best = "best"


class Device(str, Enum):
    """Values of --device."""

    cpu = "cpu"
    cuda = "cuda"


class Preset(str, Enum):
    """Values of --preset; agq_gguf/quantization/presets.py says what each means."""

    small = "small"
    balanced = "balanced"
    near_lossless = "near-lossless"


class Flash(str, Enum):
    """Values of --flash-attn."""

    auto = "auto"
    on = "on"
    off = "off"


ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="GGUF file of type AGQ4 or any other.", show_default=False)
]


Threads = Annotated[int, typer.Option("--threads", "-t", min=0, max=MAX_THREADS, help="CPU threads; 0: all.")]


FlashOption = Annotated[Flash, typer.Option("--flash-attn", help="Flash attention.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


Context = Annotated[
    int, typer.Option("--ctx", "-c", min=0, help="Context length in tokens; 0: the model's, at most 4096.")
]


Temperature = Annotated[float, typer.Option("--temp", min=0.0, help="Temperature; 0: always the most likely token.")]


Seed = Annotated[int, typer.Option("--seed", "-s", min=-1, help="Random seed; -1: a new one each time.")]


PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw a picture into this file, such as FILE.png.", show_default=False)
]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
