"""Checks that a model is still what `quantize` wrote: compares tensors and metadata with the digests in the file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from agq_gguf.arguments import Progress, no_progress
from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io.metadata import METADATA_HASH, TENSOR_HASHES
from agq_gguf.gguf_io.reader import Reader, Tensor
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.gguf_io.writer import metadata_digest


@dataclass(frozen=True)
class Verification:
    """Result of a check; the model is intact if `problems` is empty."""

    tensors: int
    bytes: int  # of all tensors
    problems: list[str]  # one line each
    metadata_edited: bool  # the metadata is not what was written; `problems` says so, too

    @property
    def only_edited(self) -> bool:
        """Whether the metadata was edited and all tensors are intact."""
        return self.metadata_edited and len(self.problems) == 1


def verify(path: str | os.PathLike[str], progress: Progress = no_progress) -> Verification:
    """Reads the whole model, also if it is split, and compares it with its digests (SHA-256) and checksums.

    Raises InputError if the file cannot be read or holds no digests.
    """
    with open_model(path) as reader:
        wanted = reader.get(TENSOR_HASHES)
        if not isinstance(wanted, list) or not all(isinstance(digest, str) for digest in wanted):
            raise InputError(
                f"{path}: holds no digests ({TENSOR_HASHES}); only files that agq-gguf wrote can be verified"
            )
        problems = []
        if len(wanted) != len(reader.tensors):
            problems.append(f"the file holds {len(wanted)} digests, but {len(reader.tensors)} tensors")
        found = metadata_digest({key: field.raw for key, field in reader.metadata.items()}, reader.tensors.values())
        edited = found != reader.get(METADATA_HASH)
        if edited:
            problems.append("the metadata was edited")
        total, done = sum(tensor.n_bytes for tensor in reader.tensors.values()), 0
        for tensor, digest in zip(reader.tensors.values(), wanted, strict=False):
            progress("verify", done, total, tensor.name)
            problem = _problem(reader, tensor, digest)
            if problem:
                problems.append(f"tensor {tensor.name}: {problem}")
            done += tensor.n_bytes
        progress("verify", done, total, "")
        return Verification(len(reader.tensors), total, problems, edited)


def _problem(reader: Reader, tensor: Tensor, wanted: str) -> str:
    """What is wrong with one tensor; '' if it is intact."""
    digest = hashlib.sha256()
    for chunk in reader.chunks(tensor.name):
        digest.update(chunk)
    if digest.hexdigest() != wanted:
        return "its bytes are not the ones that were written"
    return attribute_problem(reader, tensor)


def attribute_problem(reader: Reader, tensor: Tensor) -> str:
    """What is wrong with the attribute streams of an AGQ4 tensor; '' if they are intact. Fast."""
    if tensor.type_name != blocks.TYPE_NAME:
        return ""
    try:
        for matrix in reader.matrices(tensor.name):
            blocks.read_parameters(matrix)
    except FormatError as e:
        return str(e)
    return ""
