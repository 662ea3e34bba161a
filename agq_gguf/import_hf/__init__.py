"""Converts a Hugging Face checkpoint folder (LLaMA, OPT, BLOOM) to a float GGUF that stock llama.cpp runs.

`import_checkpoint` does all steps, in reading order; each model family has its own module.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.arguments import Progress, no_progress
from agq_gguf.errors import InputError
from agq_gguf.gguf_io.reader import Field, open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.import_hf import bloom, llama, opt
from agq_gguf.import_hf.checkpoint import Checkpoint, Config, Weights, folder_name, read_config
from agq_gguf.import_hf.packed import Scheme, Unpacked, refuse_unnamed, scheme_of
from agq_gguf.import_hf.plan import Plan, Source, Target, resolve
from agq_gguf.import_hf.tokenizer import Vocabulary, read_vocabulary
from agq_gguf.import_hf.verify import tokenizer_warnings

FAMILIES = {name: family.plan for family in (llama, opt, bloom) for name in family.ARCHITECTURES}
OUTTYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16), "bf16": (32, torch.bfloat16)}  # llama_ftype, dtype
_BLOCK = 1 << 24  # values converted at one time, which limits memory use
_POSITIONS = "position_embd.weight"  # stays F32, because it is small and added to every token

logging.getLogger("gguf").addHandler(logging.NullHandler())  # this package checks what gguf warns about


@dataclass(frozen=True)
class ImportReport:
    """Result of an import."""

    architecture: str  # llama.cpp's name
    n_tensors: int
    n_parameters: int
    n_bytes: int  # of the file
    warnings: list[str]
    packed: str = ""  # how the checkpoint was quantized, such as "GPTQ, 4 bits, groups of 128"


def import_checkpoint(
    folder: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    outtype: str = "f16",
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> ImportReport:
    """Writes the checkpoint in `folder` as a GGUF file: matrices in `outtype` (f32, f16 or bf16), other tensors in F32.

    Converts one tensor at a time, so memory use is limited by the largest tensor. PyTorch files (.bin) are loaded
    without running the code in them, unless `allow_pickle` is True. Raises InputError if the checkpoint is not
    supported or damaged, OutputError if the file cannot be written, and then leaves `dst` unchanged.
    """
    source, target = Path(folder), Path(dst)
    if outtype not in OUTTYPES:
        raise InputError(f"outtype must be one of {', '.join(OUTTYPES)}, got {outtype!r}")
    config = read_config(source)
    if target.parent.resolve() == source.resolve() and target.suffix != ".gguf":
        raise InputError(f"{target}: is in the checkpoint's folder; use a name that ends in .gguf")
    plan = _choose(config)(config)
    scheme = scheme_of(config, source)
    with Checkpoint(source, allow_pickle=allow_pickle) as files:
        checkpoint = weights_of(files, scheme)
        names = resolve(plan, checkpoint)
        vocabulary = read_vocabulary(source, plan.n_vocab, config.values)
        with tempfile.TemporaryDirectory(prefix="agq-gguf-") as scratch:
            header = Path(scratch) / "header.gguf"
            _write_header(header, plan, vocabulary, folder_name(source), outtype)
            warnings = plan.warnings + vocabulary.warnings + tokenizer_warnings(header, source, vocabulary)
            with open_gguf(header) as reader:
                metadata = reader.metadata
        report = _write(target, plan, checkpoint, names, metadata, outtype, warnings, progress)
    return replace(report, packed=str(scheme or ""))


def weights_of(files: Checkpoint, scheme: Scheme | None) -> Weights:
    """The weights of a checkpoint as floats. Raises InputError if they are packed in a way that nothing names."""
    if scheme is None:
        refuse_unnamed(files)
        return files
    return Unpacked(files, scheme)


def _choose(config: Config) -> Callable[[Config], Plan]:
    """The planner for the model family of a config. Raises InputError for other models, with a way to convert them."""
    found = config.get("architectures", [])
    name = found[0] if isinstance(found, list) and found and isinstance(found[0], str) else None
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(
            f"{config.path}: architecture {name or '(not named)'} is not supported, only {known}; use llama.cpp's "
            "convert_hf_to_gguf.py, and then `agq-gguf quantize` with its F16 file"
        )
    return FAMILIES[name]


def _write_header(path: Path, plan: Plan, vocabulary: Vocabulary, name: str, outtype: str) -> None:
    """Writes all metadata as a separate GGUF, with one small tensor because readers expect one."""
    writer = gguf.GGUFWriter(path, plan.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(OUTTYPES[outtype][0])
    plan.set_metadata(writer)
    vocabulary.add_to(writer)
    writer.add_tensor("output_norm.weight", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(
    path: Path,
    plan: Plan,
    checkpoint: Weights,
    names: dict[str, str],
    metadata: dict[str, Field],
    outtype: str,
    warnings: list[str],
    progress: Progress,
) -> ImportReport:
    types = {t.name: outtype if len(t.shape) > 1 and t.name != _POSITIONS else "f32" for t in plan.targets}
    placed = layout((target.name, types[target.name], target.shape) for target in plan.targets)
    total, done = sum(tensor.n_elements for tensor in placed), 0
    with Writer(path, metadata, {}, placed) as writer:
        for target, tensor in zip(plan.targets, placed, strict=True):
            progress("import", done, total, target.name)
            writer.write(target.name, _parts(target, checkpoint, names, types[target.name]))
            done += tensor.n_elements
        progress("import", done, total, "")
    return ImportReport(plan.architecture, len(placed), total, writer.n_bytes, warnings)


def _parts(target: Target, checkpoint: Weights, names: dict[str, str], type_name: str) -> Iterator[NDArray[Any]]:
    """The values of one tensor in the target type, in blocks."""
    if target.constant is not None:
        yield from _converted(target.constant, type_name, target.name)
    for source in target.sources:
        yield from _converted(_load(checkpoint, names, source), type_name, names[source.name])


def _load(checkpoint: Weights, names: dict[str, str], source: Source) -> torch.Tensor:
    tensor = checkpoint.load(names[source.name])
    return tensor if source.change is None else source.change(tensor)


def _converted(tensor: torch.Tensor, type_name: str, name: str) -> Iterator[NDArray[Any]]:
    dtype = OUTTYPES[type_name][1]
    for block in tensor.reshape(-1).split(_BLOCK):
        converted = block.to(dtype)
        if not bool(torch.isfinite(converted).all()):
            cure = "use --outtype bf16 or f32" if torch.isfinite(block).all() else "the checkpoint is damaged"
            raise InputError(f"tensor {name} holds values that are not finite in {type_name}; {cure}")
        if dtype is torch.bfloat16:
            converted = converted.view(torch.int16)
        yield converted.numpy()
