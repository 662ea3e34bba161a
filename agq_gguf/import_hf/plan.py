"""What an import writes: the tensors of the GGUF file, and how each is made from tensors of the checkpoint.

A family (`llama.py`, `opt.py`, `bloom.py`) turns a config into a list of `Target`s and metadata; everything else is
common to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from agq_gguf.errors import InputError
from agq_gguf.import_hf.checkpoint import Checkpoint

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint. `change` may return another shape, but as many rows as it says in the target."""

    name: str
    shape: tuple[int, ...]
    change: Change | None = None


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file: the sources below one another, or a constant."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...] = ()
    constant: torch.Tensor | None = None


@dataclass
class Plan:
    """What becomes of a checkpoint."""

    architecture: str  # llama.cpp's name
    targets: list[Target]
    n_vocab: int
    set_metadata: Callable[[Any], None]  # adds the hyperparameters to a gguf.GGUFWriter
    ignored: Callable[[str], bool]  # tensors of the checkpoint that are of no use, by their name without prefix
    prefixes: tuple[str, ...]  # that names may begin with, longest first; sources are named without
    warnings: list[str] = field(default_factory=list)


def resolve(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """Source name -> name in the checkpoint. Raises InputError for missing, misshapen or unknown tensors."""
    names: dict[str, str] = {}
    for name in checkpoint.shapes:
        short = strip(name, plan.prefixes)
        if short in names:
            raise InputError(f"{checkpoint.folder}: holds both {names[short]} and {name}, which mean the same tensor")
        names[short] = name
    wanted = {source.name: source for target in plan.targets for source in target.sources}
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{checkpoint.folder}: {len(missing)} of {len(wanted)} tensors are missing, first {missing[0]}; "
            "the weights do not belong to this config.json, or a part of them was not downloaded"
        )
    for source in wanted.values():
        shape = checkpoint.shapes[names[source.name]]
        if shape != source.shape:
            found = f"has the shape {list(shape)}" if shape else "holds no plain floats (is the checkpoint quantized?)"
            raise InputError(
                f"{checkpoint.folder}: tensor {names[source.name]} {found}; config.json wants {list(source.shape)}"
            )
    unknown = [found for short, found in names.items() if short not in wanted and not plan.ignored(short)]
    if unknown:
        raise InputError(
            f"{checkpoint.folder}: {len(unknown)} tensors are not part of this kind of model, first {unknown[0]}; "
            "leaving them out would change what the model says"
        )
    return names


def strip(name: str, prefixes: Sequence[str]) -> str:
    """The name without the first of the prefixes that it has."""
    return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
