"""The command `inspect`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Json, ModelArgument
from agq_gguf.cli.prune import show_pruning
from agq_gguf.errors import FormatError

if TYPE_CHECKING:
    from agq_gguf.inspection.inspect import ModelInfo, TensorInfo


def inspect(model: ModelArgument, as_json: Json = False) -> None:
    """Show what is in a GGUF file."""
    from agq_gguf.inspection.inspect import inspect_file

    info = inspect_file(model)
    if as_json:
        show.write_json(asdict(info))
    else:
        show_model(info)
    if info.problems:
        raise FormatError(f"{model}: {len(info.problems)} damaged AGQ4 tensors; first: {info.problems[0]}")


def show_model(info: ModelInfo) -> None:
    """Prints what is in a file."""
    show.say(f"{info.path}: {info.name or 'unnamed'}, architecture {info.architecture or 'unknown'}")
    show.say(
        f"{info.parameters / 1e6:.2f} million parameters, {show.size(info.file_bytes)}, "
        f"{info.bits_per_weight:.2f} bits per weight\n"
    )
    types = [[n, t.tensors, show.size(t.bytes), f"{t.bits_per_weight:.2f}"] for n, t in info.types.items()]
    show.table(["type", ">tensors", ">size", ">bits per weight"], types)
    show.say()
    rows = []
    for tensor in info.tensors:
        shape = " x ".join(map(str, tensor.shape))
        error = "" if tensor.error is None else f"{tensor.error:.3%}"
        rows.append([tensor.name, tensor.type, shape, show.size(tensor.bytes), error, _attributes(tensor)])
    show.table(["tensor", "type", "shape", ">size", ">error", "AGQ4 attributes"], rows)
    if info.pruning is not None:
        show.say()
        show_pruning(info.pruning)
    metadata = [[f"agq.{key}", value] for key, value in info.metadata.items() if not key.startswith("prune.curve.")]
    if metadata:
        show.say()
        show.table(["metadata", "value"], metadata)


def _attributes(tensor: TensorInfo) -> str:
    """The parameters of an AGQ4 tensor in one line."""
    if tensor.problem:
        return f"DAMAGED: {tensor.problem}"
    found = tensor.agq
    if found is None:
        return ""
    experts = f"{found.matrices} experts, " if found.matrices > 1 else ""
    pruning = (
        f", drops tokens with score {found.pruning.score} < {found.pruning.threshold:.4g}" if found.pruning else ""
    )
    activations = f"{experts}{found.activation_bits}-bit activations, scale: {found.activation_scale}"
    refined = ""
    if found.exponent_max or found.listed_channels:
        refined = (
            f", exponents {found.exponent_min}..{found.exponent_max} "
            f"({found.exponents_nonzero:.0%} of groups refined), "
            f"{found.listed_channels} channels reordered"
        )
    return activations + refined + pruning
