"""The pipeline from a float GGUF to an AGQ4 GGUF, in reading order; the only module that knows every stage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf import blocks
from agq_gguf.errors import InputError
from agq_gguf.quantizer import MatrixOptions, PreparedInput, prepare_input, quantize_matrix
from agq_gguf.reader import Reader, Tensor, check_source, open_gguf
from agq_gguf.recipe import TensorPlan, plan
from agq_gguf.stats import WeightStats, check_shapes, load_imatrix
from agq_gguf.writer import Writer, layout

Progress = Callable[[str, int, int, str], None]  # phase, done, total, what is being worked on


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user can choose."""

    output_type: str = "q8_0"
    embedding_type: str = blocks.TYPE_NAME
    threads: int = 0  # 0: all cores
    memory: int = 4 << 30  # bytes that calibration may use for the statistics it holds at a time
    calibration_tokens: int = 32768  # at most
    context: int = 512  # tokens of a calibration chunk
    matrix: MatrixOptions = field(default_factory=MatrixOptions)


@dataclass(frozen=True)
class TensorReport:
    name: str
    type_name: str
    n_elements: int
    n_bytes: int
    reason: str = ""  # why it is not AGQ4
    error: float | None = None  # AGQ4: squared output error over squared output on the calibration data
    note: str = ""  # what was done with less than wanted, and why


@dataclass(frozen=True)
class Report:
    tensors: list[TensorReport]
    n_bytes: int  # of the file
    guidance: str  # what guided the quantization
    warnings: list[str]

    def by_type(self) -> dict[str, tuple[int, int, float]]:
        """Type name -> (tensors, bytes, bits per weight), largest first."""
        found: dict[str, tuple[int, int, float]] = {}
        for type_name in {tensor.type_name for tensor in self.tensors}:
            group = [tensor for tensor in self.tensors if tensor.type_name == type_name]
            n_bytes = sum(tensor.n_bytes for tensor in group)
            found[type_name] = (len(group), n_bytes, 8 * n_bytes / sum(tensor.n_elements for tensor in group))
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(t.n_bytes for t in self.tensors) / sum(t.n_elements for t in self.tensors)


def _silent(phase: str, done: int, total: int, what: str) -> None:
    """Progress nobody asked for."""


def plan_file(src: str | os.PathLike[str], options: QuantizeOptions | None = None) -> list[TensorPlan]:
    """What `quantize` would do with each tensor, without doing it."""
    options = options or QuantizeOptions()
    with open_gguf(src) as reader:
        check_source(reader)
        return plan(reader, output_type=options.output_type, embedding_type=options.embedding_type)


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str] | Iterable[str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    options: QuantizeOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantizes the model `src` (F32, F16 or BF16 GGUF) into `dst`.

    `calibration` is the path of a text file, or strings of text; `imatrix` an importance matrix for the same model, used
    where no text is given. Without both, all activations count alike, which costs quality; the report then says so.
    Raises InputError, FormatError or OutputError; `dst` is untouched then.
    """
    options, progress = options or QuantizeOptions(), progress or _silent
    with open_gguf(src) as reader:
        check_source(reader)
        if os.path.exists(dst) and os.path.samefile(src, dst):
            raise InputError(f"{dst}: is the model that is read; write to another file")
        plans = plan(reader, output_type=options.output_type, embedding_type=options.embedding_type)
        stats, guidance, warnings = _gather(reader, plans, calibration, imatrix, options, progress)
        return _write(reader, Path(dst), plans, stats, guidance, warnings, options, progress)


def _gather(
    reader: Reader,
    plans: list[TensorPlan],
    calibration: str | os.PathLike[str] | Iterable[str] | None,
    imatrix: str | os.PathLike[str] | None,
    options: QuantizeOptions,
    progress: Progress,
) -> tuple[dict[str, WeightStats], str, list[str]]:
    """Statistics by weight name, what they come from, warnings."""
    columns = {p.source.name: p.source.shape[-1] for p in plans if p.type_name == blocks.TYPE_NAME}
    if imatrix is not None:
        stats = load_imatrix(imatrix)
        check_shapes(stats, columns, str(imatrix))
        return stats, f"imatrix {Path(imatrix).name}", _missing(stats, columns)
    return {}, "none", ["quantized without calibration: all activations count alike; a text file gives better results"]


def _missing(stats: dict[str, WeightStats], columns: dict[str, int]) -> list[str]:
    """A warning about the weights that got no statistics."""
    missing = [name for name in columns if name not in stats]
    if not missing:
        return []
    return [f"no activations were seen for {len(missing)} tensors ({', '.join(missing[:3])}...), they count alike there"]


def _write(
    reader: Reader,
    dst: Path,
    plans: list[TensorPlan],
    stats: dict[str, WeightStats],
    guidance: str,
    warnings: list[str],
    options: QuantizeOptions,
    progress: Progress,
) -> Report:
    placed = layout((p.source.name, p.type_name, p.source.shape) for p in plans)
    total = sum(p.source.n_elements for p in plans)
    done, reports = 0, []
    with Writer(dst, reader.metadata, _metadata(plans, guidance, options), placed) as writer:
        for p, target in zip(plans, placed, strict=True):
            progress("quantize", done, total, p.source.name)
            error, note = None, ""
            if p.type_name == blocks.TYPE_NAME:
                data, error, note = _quantize_tensor(reader, p.source, stats.get(p.source.name), options)
                writer.write(p.source.name, data)
            elif p.type_name == p.source.type_name:
                writer.write(p.source.name, reader.raw(p.source.name))
            else:
                writer.write(p.source.name, _stock(reader.read(p.source.name), p.type_name))
            done += p.source.n_elements
            reports.append(
                TensorReport(p.source.name, p.type_name, p.source.n_elements, target.n_bytes, p.reason, error, note)
            )
        progress("quantize", done, total, "")
    return Report(reports, writer.n_bytes, guidance, warnings)


def _quantize_tensor(
    reader: Reader, tensor: Tensor, stats: WeightStats | None, options: QuantizeOptions
) -> tuple[NDArray[np.uint8], float, str]:
    """AGQ4 bytes of a tensor (of each of its experts), its mean error, notes."""
    weights = reader.read(tensor.name)
    matrices = weights.reshape(-1, *weights.shape[-2:])
    rows, columns = matrices.shape[1:]
    capacity = (blocks.stream_bytes(rows, columns) - blocks.parameters_bytes(columns, 0) - 2) // 2
    packed, errors, notes = [], [], []
    for expert, matrix in enumerate(matrices):
        prepared = prepare_input(stats.of(expert) if stats else None, columns, capacity, options.matrix)
        result = quantize_matrix(matrix, prepared, options.matrix, tensor.name)
        packed.append(blocks.pack(result.matrix))
        errors.append(result.error)
        notes.append(result.note)
    return np.concatenate(packed), float(np.mean(errors)), "; ".join(sorted(set(filter(None, notes))))


def _stock(weights: NDArray[np.float32], type_name: str) -> NDArray[Any]:
    if type_name == "f32":
        return weights
    if type_name == "f16":
        return weights.astype(np.float16)
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(weights, GGMLQuantizationType[type_name.upper()])


def _metadata(plans: list[TensorPlan], guidance: str, options: QuantizeOptions) -> dict[str, str | bool | int | float]:
    counts = Counter(p.type_name for p in plans)
    return {
        "general.quantization_version": 2,  # ggml's GGML_QNT_VERSION, which stock quantized files carry
        "general.file_type": 100 + blocks.TYPE_ID,  # no stock number; programs show it as unknown
        "agq.version": blocks.VERSION,
        "agq.calibration": guidance,
        "agq.activation_bits": options.matrix.activation_bits,
        "agq.activation_scale": "group" if options.matrix.per_group else "token",
        **{f"agq.tensors.{type_name}": n for type_name, n in sorted(counts.items())},
    }
