"""Summarizes a GGUF file: sizes, types, tensors, this package's metadata, the parameters of AGQ4 tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from agq_gguf.errors import FormatError
from agq_gguf.format import blocks, pruning_record
from agq_gguf.gguf_io import metadata
from agq_gguf.gguf_io.reader import Reader, Tensor
from agq_gguf.gguf_io.shards import open_model, paths_of
from agq_gguf.pruning.file import PruningInfo, pruning_info

_NOT_SHOWN = (
    metadata.HASH_PREFIX,
    metadata.ERROR_PREFIX,
)  # digests are for `verify`; errors are shown with the tensors


@dataclass(frozen=True)
class AgqAttributes:
    """Parameters of an AGQ4 tensor. With experts: the shared parameters, and the range of those that differ."""

    version: int  # of the format
    matrices: int  # more than one: experts
    activation_bits: int
    activation_scale: str  # one of blocks.ACTIVATION_SCALES
    codebook: list[int]  # of the first matrix, as the integers that codes stand for
    exponent_min: int
    exponent_max: int
    exponents_nonzero: float  # share of the groups that are refined
    listed_channels: int  # channels that the channel order lists, maximum over experts; 0: no reordering
    pruning: pruning_record.Pruning | None = None  # the pruning record


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `shape` has rows before columns."""

    name: str
    type: str
    shape: list[int]
    bytes: int
    agq: AgqAttributes | None = None
    problem: str = ""  # what is wrong with its parameters
    error: float | None = None  # AGQ4: squared output error over squared output, as the quantizer measured it


@dataclass(frozen=True)
class TypeInfo:
    """All tensors of one type."""

    tensors: int
    elements: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class ModelInfo:
    """Summary of a file."""

    path: str
    architecture: str
    name: str
    parameters: int
    file_bytes: int
    tensor_bytes: int
    bits_per_weight: float
    types: dict[str, TypeInfo]  # largest first
    metadata: dict[str, Any]  # the keys agq.* of this package
    hyperparameters: dict[str, Any]  # the scalar keys of the architecture
    tensors: list[TensorInfo]
    pruning: PruningInfo | None = None  # its pruning calibration, if any

    @property
    def problems(self) -> list[str]:
        """One line for each damaged tensor."""
        return [f"{tensor.name}: {tensor.problem}" for tensor in self.tensors if tensor.problem]


def inspect_file(path: str | os.PathLike[str]) -> ModelInfo:
    """Reads only the header and the AGQ4 attributes. Raises InputError; the result reports damaged AGQ4 tensors."""
    with open_model(path) as reader:
        errors = metadata.read_errors(reader)
        tensors = [_tensor_info(reader, tensor, errors.get(tensor.name)) for tensor in reader.tensors.values()]
        elements = [tensor.n_elements for tensor in reader.tensors.values()]
        n_bytes = sum(tensor.bytes for tensor in tensors)
        return ModelInfo(
            path=os.fspath(path),
            architecture=reader.architecture,
            name=str(reader.get("general.name", "")),
            parameters=sum(elements),
            file_bytes=sum(part.stat().st_size for part in paths_of(reader)),
            tensor_bytes=n_bytes,
            bits_per_weight=8 * n_bytes / max(sum(elements), 1),
            types=_types(reader.tensors.values()),
            metadata=_scalars(reader, metadata.PREFIX),
            hyperparameters=_scalars(reader, f"{reader.architecture}."),
            tensors=tensors,
            pruning=pruning_info(reader),
        )


def _types(tensors: Iterable[Tensor]) -> dict[str, TypeInfo]:
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type_name, []).append(tensor)
    infos = {}
    for type_name, group in groups.items():
        elements, n_bytes = sum(t.n_elements for t in group), sum(t.n_bytes for t in group)
        infos[type_name] = TypeInfo(len(group), elements, n_bytes, 8 * n_bytes / elements)
    return dict(sorted(infos.items(), key=lambda item: -item[1].bytes))


def _scalars(reader: Reader, prefix: str) -> dict[str, Any]:
    """Metadata under a prefix, without the prefix; short arrays as lists, long arrays as their length."""
    found: dict[str, Any] = {}
    for key, entry in reader.metadata.items():
        if prefix != "." and key.startswith(prefix) and not key.startswith(_NOT_SHOWN):
            value = entry.value.tolist() if isinstance(entry.value, np.ndarray) else entry.value
            long = isinstance(value, list) and len(value) > 256
            found[key[len(prefix) :]] = f"array of {len(value)}" if long else value
    return found


def _tensor_info(reader: Reader, tensor: Tensor, error: float | None) -> TensorInfo:
    attributes, problem = None, ""
    if tensor.type_name == blocks.TYPE_NAME:
        try:
            attributes = _attributes(reader, tensor)
        except FormatError as e:
            problem = str(e)
    return TensorInfo(tensor.name, tensor.type_name, list(tensor.shape), tensor.n_bytes, attributes, problem, error)


def _attributes(reader: Reader, tensor: Tensor) -> AgqAttributes:
    found = [blocks.read_parameters(matrix) for matrix in reader.matrices(tensor.name)]
    exponents = np.concatenate([parameters.exponents for parameters in found])
    first = found[0]
    return AgqAttributes(
        version=blocks.VERSION,
        matrices=len(found),
        activation_bits=first.activation_bits,
        activation_scale=first.activation_scale,
        codebook=[int(u) - 64 for u in first.codebook],
        exponent_min=int(exponents.min()),
        exponent_max=int(exponents.max()),
        exponents_nonzero=float((exponents > 0).mean()),
        listed_channels=max(int(parameters.listed.size) for parameters in found),
        pruning=first.pruning,
    )
