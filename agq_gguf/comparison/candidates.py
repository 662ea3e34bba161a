"""The files that a comparison makes of a model: llama.cpp's types, and AGQ4 with presets and budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress, Text
from agq_gguf.errors import InputError
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize
from agq_gguf.quantization.presets import PRESETS, with_preset
from agq_gguf.runtime.stock_quantize import STOCK_FILE_TYPES, quantize_stock

PREFIX = "agq4:"
DEFAULT = ("q4_0", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0", *(PREFIX + name for name in PRESETS))


@dataclass(frozen=True)
class Candidate:
    """A file to make."""

    name: str  # one of STOCK_FILE_TYPES, or agq4: and a preset or a number of bits per weight
    options: QuantizeOptions | None = None  # of AGQ4; None: one of llama.cpp's types

    @property
    def file_name(self) -> str:
        """A name that every file system takes."""
        return self.name.replace(":", "-") + ".gguf"

    @property
    def key(self) -> str:
        """Everything that decides the file, but for its source and its text; threads do not."""
        return f"{self.name} {replace(self.options, threads=0) if self.options else None!r}"

    def make(
        self,
        source: Path,
        target: Path,
        text: Text | None,
        importance: Mapping[str, NDArray[np.float32]],
        shared: Path,
        threads: int,
        progress: Progress,
    ) -> None:
        """Writes the file. `importance` is used for llama.cpp's types, `text` for AGQ4.

        The folder `shared` keeps matrices that several AGQ4 files have in common.
        """
        if self.options is None:
            quantize_stock(source, target, self.name, threads, importance=importance)
        else:
            options = replace(self.options, shared=str(shared))
            quantize(source, target, calibration=text, options=options, progress=progress)


def candidates(names: Sequence[str], options: QuantizeOptions) -> list[Candidate]:
    """The candidates of these names; `options` are those of all AGQ4 files. Raises InputError for an unknown name."""
    return [_candidate(name.lower(), options) for name in dict.fromkeys(names)]


def _candidate(name: str, options: QuantizeOptions) -> Candidate:
    if name in STOCK_FILE_TYPES:
        return Candidate(name)
    which = name.removeprefix(PREFIX)
    if name.startswith(PREFIX) and which in PRESETS:
        return Candidate(name, with_preset(options, which))
    try:
        bits = float(which) if name.startswith(PREFIX) else 0.0
    except ValueError:
        bits = 0.0
    if not 4 < bits < 16:
        raise InputError(
            f"a type must be one of {', '.join(STOCK_FILE_TYPES)}, {PREFIX} and a preset ({', '.join(PRESETS)}), or "
            f"{PREFIX} and a number of bits per weight such as {PREFIX}5.0, got {name!r}"
        )
    return Candidate(name, replace(options, target_bpw=bits))
