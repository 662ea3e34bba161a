"""Plans an import: the tensors of the GGUF file, and the tensors of the checkpoint that each is made from.

A model family (`llama.py`, `opt.py`, `bloom.py`) turns a config into a list of `Target`s and metadata; everything else
is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from agq_gguf.errors import InputError
from agq_gguf.import_hf.checkpoint import Weights

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint. `change` converts it to its part of the target and may change its shape."""

    name: str
    shape: tuple[int, ...]
    change: Change | None = None


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file: its sources, concatenated by rows, or a constant."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...] = ()
    constant: torch.Tensor | None = None


@dataclass
class Plan:
    """The content of the GGUF file."""

    architecture: str  # llama.cpp's name
    targets: list[Target]
    n_vocab: int
    set_metadata: Callable[[Any], None]  # adds the hyperparameters to a gguf.GGUFWriter
    ignored: Callable[[str], bool]  # whether a tensor of the checkpoint is not needed, by its name without prefix
    prefixes: tuple[str, ...]  # possible prefixes of names, longest first; names of sources have no prefix
    warnings: list[str] = field(default_factory=list)


def resolve(plan: Plan, checkpoint: Weights) -> dict[str, str]:
    """Source name -> name in the checkpoint. Raises InputError for missing or unknown tensors, or wrong shapes."""
    names: dict[str, str] = {}
    for name in checkpoint.shapes:
        short = strip(name, plan.prefixes)
        if short in names:
            raise InputError(f"{checkpoint.folder}: has both {names[short]} and {name}, which name the same tensor")
        names[short] = name
    wanted = {source.name: source for target in plan.targets for source in target.sources}
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{checkpoint.folder}: {len(missing)} of {len(wanted)} tensors are missing, first {missing[0]}; "
            "the weights do not belong to this config.json, or their download is incomplete"
        )
    for source in wanted.values():
        shape = checkpoint.shapes[names[source.name]]
        if shape != source.shape:
            found = f"has the shape {list(shape)}" if shape else "is not float (the checkpoint may be quantized)"
            raise InputError(
                f"{checkpoint.folder}: tensor {names[source.name]} {found}; config.json needs {list(source.shape)}"
            )
    unknown = [found for short, found in names.items() if short not in wanted and not plan.ignored(short)]
    if unknown:
        raise InputError(
            f"{checkpoint.folder}: {len(unknown)} tensors are not part of this architecture, first {unknown[0]}; "
            "the model needs them, so it cannot be imported"
        )
    return names


def strip(name: str, prefixes: Sequence[str]) -> str:
    """The name without the first matching prefix."""
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
