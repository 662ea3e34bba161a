"""Reads and replaces the pruning of a model file: records inside AGQ4 tensors, and readable metadata."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress
from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import blocks, pruning_record
from agq_gguf.gguf_io.metadata import PRUNE_PREFIX
from agq_gguf.gguf_io.reader import Reader, Tensor
from agq_gguf.gguf_io.shards import ShardedReader, paths_of
from agq_gguf.gguf_io.tensor_names import layer_of
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.pruning.plan import Plan
from agq_gguf.pruning.report import Kept

_PREFERRED = "attn_output.weight"


@dataclass(frozen=True)
class CurvePoint:
    """What a setting saves and costs, as measured by calibration."""

    saving: float  # share of the work of a prompt
    kl: float  # of the tokens that follow, from the unpruned model, in nats
    nll: float
    spec: str  # for `agq_gguf.options(prune=...)` and AGQ_PRUNE


@dataclass(frozen=True)
class PruningInfo:
    """What a file says about its pruning."""

    calibration: str  # the text
    saving: float
    nll: float  # of the tokens that follow, without pruning
    curve: list[CurvePoint]
    kept: Kept | None = None  # if it was chosen by answers


def pruning_info(reader: Reader) -> PruningInfo | None:
    """The calibration in the metadata; None if there is none or it is damaged."""

    def value(key: str) -> Any:
        found = reader.get(PRUNE_PREFIX + key)
        return found.tolist() if isinstance(found, np.ndarray) else found

    layers, saving = value("layers"), value("curve.saving")
    try:
        columns = [np.array(value(f"curve.{key}"), np.float64) for key in ("saving", "kl", "nll")]
        thresholds = np.array(value("curve.thresholds"), np.float32).reshape(len(saving), len(layers))
        heads = _heads_of(reader, layers) if str(value("score")) == "heads" else ()
        plans = [
            Plan(
                tuple((int(layer), float(t)) for layer, t in zip(layers, row, strict=True)),
                str(value("score")),
                int(value("keep")),
                int(value("reach")),
                bool(value("reuse")),
                heads,
            )
            for row in thresholds
        ]
        rows = zip(*(column.tolist() for column in columns), plans, strict=True)
        points = [CurvePoint(saved, kl, nll, plan.spec()) for saved, kl, nll, plan in rows]
        numbers = float(value("saving")), float(value("nll"))
        kept = None if value("answers.kinds") is None else Kept.of(lambda name: value(f"answers.{name}"))
    except (TypeError, ValueError, OverflowError, FormatError):
        return None
    return PruningInfo(str(value("calibration")), *numbers, points, kept)


def _heads_of(reader: Reader, layers: Sequence[int]) -> tuple[pruning_record.Heads, ...]:
    """The heads that the records of these layers name. Raises FormatError if a record is missing."""
    records = {
        layer: found.heads
        for name, tensor in reader.tensors.items()
        if (layer := layer_of(name)) in layers and _is_matrix(tensor)
        if (found := reader.parameters(name).pruning) is not None and found.heads is not None
    }
    if missing := set(layers) - set(records):
        raise FormatError(f"{reader.path}: layer {min(missing)} has no pruning record with heads")
    return tuple(records[layer] for layer in layers)


def carriers(reader: Reader, record_bytes: int = pruning_record.pruning_bytes()) -> dict[int, str]:
    """For each layer, the tensor that can hold a record of this size: an AGQ4 matrix with enough room.

    Raises FormatError for damaged tensors.
    """
    found: dict[int, str] = {}
    for name, tensor in reader.tensors.items():
        layer = layer_of(name)
        if layer is None or not _can_carry(reader, tensor, record_bytes):
            continue
        if layer not in found or name.endswith(_PREFERRED):
            found[layer] = name
    return found


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.type_name == blocks.TYPE_NAME and len(tensor.shape) == 2


def _matrix(reader: Reader, tensor: Tensor) -> NDArray[np.uint8]:
    return np.frombuffer(reader.read_bytes(tensor.name, 0, tensor.n_bytes), np.uint8).reshape(tensor.shape[0], -1)


def _can_carry(reader: Reader, tensor: Tensor, record_bytes: int) -> bool:
    if not _is_matrix(tensor):
        return False
    listed = reader.parameters(tensor.name).listed.size
    needed = blocks.parameters_bytes(tensor.shape[1], listed, record_bytes)
    return needed <= blocks.stream_bytes(*tensor.shape)


def write_plan(
    reader: Reader,
    dst: str | os.PathLike[str],
    records: Mapping[str, pruning_record.Pruning],
    metadata: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Copies a model to `dst` with these records (by tensor) and metadata keys; removes all earlier ones.

    `dst` may be the source file; it is replaced when the copy is complete. Raises InputError for a part of a split
    model, FormatError or OutputError.
    """
    if isinstance(reader, ShardedReader) and any(Path(dst).resolve() == path.resolve() for path in paths_of(reader)):
        raise InputError(f"{dst}: is part of a split model; write to another file (it will be one file)")
    kept = {key: value for key, value in reader.metadata.items() if not key.startswith(PRUNE_PREFIX)}
    tensors = list(reader.tensors.values())
    placed = layout((t.name, t.type_name, t.shape) for t in tensors)
    total = sum(t.n_bytes for t in tensors)
    done = 0
    with Writer(Path(dst), kept, metadata, placed) as writer:
        for tensor in tensors:
            progress("write", done, total, tensor.name)
            writer.write(tensor.name, _content(reader, tensor, records.get(tensor.name)))
            done += tensor.n_bytes
        reader.check_unchanged()
        progress("write", total, total, "")


def _content(
    reader: Reader, tensor: Tensor, record: pruning_record.Pruning | None
) -> Iterable[memoryview | NDArray[np.uint8]]:
    """The bytes of a tensor, with its record replaced."""
    if not _is_matrix(tensor) or layer_of(tensor.name) is None:
        return reader.chunks(tensor.name)
    if reader.parameters(tensor.name).pruning == record:
        return reader.chunks(tensor.name)
    try:
        return [blocks.with_pruning(_matrix(reader, tensor), record)]
    except FormatError as e:
        raise FormatError(f"{reader.path}: {tensor.name}: {e}") from e
