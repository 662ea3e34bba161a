"""The pipeline from a float GGUF to an AGQ4 GGUF, in reading order; the only module that knows every stage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf import __version__, blocks, equalize, stock
from agq_gguf.arguments import PathName, Progress, Text
from agq_gguf.errors import InputError
from agq_gguf.host import default_threads
from agq_gguf.journal import Journal, digest, folder_of
from agq_gguf.quantizer import MatrixOptions, QuantizedMatrix, prepare_input, quantize_matrix
from agq_gguf.reader import Reader, Tensor, check_source
from agq_gguf.recipe import EMBEDDING, TensorPlan, plan
from agq_gguf.shards import open_model, paths_of
from agq_gguf.stats import WeightStats, check_shapes, load_imatrix
from agq_gguf.writer import Writer, layout

if TYPE_CHECKING:
    from agq_gguf.refined import Refined

_STOCK_ROWS = 4096  # converted at a time: bounds memory
_FEW_TOKENS = 4096  # of calibration text; less is worth a warning
ERROR_TENSORS, ERROR_VALUES = "agq.error.tensors", "agq.error.values"  # metadata: squared output errors by tensor
QUALITIES = ("fast", "balanced", "best")
REPLACED = "adjusted with the matrices behind it"  # what the report says of norms that are not the source's


@dataclass(frozen=True)
class QuantizeOptions:
    """What a user can choose."""

    quality: str = "balanced"  # one of QUALITIES
    resume: bool = False  # keep what is finished beside the output, and go on from there
    output_type: str = "auto"  # q8_0, or what the target allows
    embedding_type: str = "auto"  # q8_0 for small models, else agq4
    target_bpw: float = 0.0  # bits per weight of the whole model, at most; 0: no target
    threads: int = 0  # 0: all that this process may use
    memory: int = 4 << 30  # bytes that calibration may use for the statistics it holds at a time
    calibration_tokens: int = 32768  # at most
    tune: bool = True  # norms and scales, in the end (`best`)
    context: int = 512  # tokens of a calibration chunk
    split_size: int = 0  # bytes of a file, at most; 0: one file
    matrix: MatrixOptions = field(default_factory=MatrixOptions)

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise InputError(f"unknown quality {self.quality!r}; known are {', '.join(QUALITIES)}")
        if not (np.isfinite(self.target_bpw) and self.target_bpw >= 0):
            raise InputError(f"the target is {self.target_bpw} bits per weight, it must be a positive number")
        if self.quality == "fast":
            object.__setattr__(self, "matrix", replace(self.matrix, error_feedback=False))


def activation_options(bits: int, scale: str = "rotated") -> MatrixOptions:
    """How matrices are quantized for activations of 8 or 4 bits, with a scale per "token", per token and "group" of 64
    channels, or per group after it was "rotated" (docs/format.md)."""
    if bits not in (4, 8):
        raise InputError(f"activations of {bits} bits are not to be had, only 8 and 4")
    if scale not in blocks.ACTIVATION_SCALES:
        known = ", ".join(map(repr, blocks.ACTIVATION_SCALES))
        raise InputError(f"activations with a scale per {scale!r} are not to be had, only {known}")
    return MatrixOptions(activation_bits=bits, activation_scale=scale)


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    type_name: str
    n_elements: int
    n_bytes: int
    reason: str = ""  # why it is not AGQ4
    error: float | None = None  # AGQ4: squared output error over squared output on the calibration data
    note: str = ""  # what was done with less than wanted, and why


@dataclass(frozen=True)
class Report:
    """What became of a model."""

    tensors: list[TensorReport]
    n_bytes: int  # of the file
    guidance: str  # what guided the quantization
    warnings: list[str]
    paths: list[Path] = field(compare=False)  # the files; the first is the one to open

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
        """Over all tensors, without the header."""
        return 8 * sum(t.n_bytes for t in self.tensors) / sum(t.n_elements for t in self.tensors)


def _silent(phase: str, done: int, total: int, what: str) -> None:
    """Progress nobody asked for."""


def plan_file(
    src: PathName,
    options: QuantizeOptions | None = None,
    *,
    calibration: Text | None = None,
    imatrix: PathName | None = None,
    progress: Progress | None = None,
) -> list[TensorPlan]:
    """What `quantize` would do with each tensor, without doing it; text and matrix matter under a target only."""
    options = options or QuantizeOptions()
    with open_model(src) as reader, _torch_threads(options.threads):
        check_source(reader)
        return _plans(reader, calibration, imatrix, options, progress or _silent)


def _plans(
    reader: Reader,
    calibration: Text | None,
    imatrix: PathName | None,
    options: QuantizeOptions,
    progress: Progress,
) -> list[TensorPlan]:
    if not options.target_bpw:
        return plan(reader, output_type=options.output_type, embedding_type=options.embedding_type)
    from agq_gguf.mixture import choose_types

    return choose_types(reader, calibration, imatrix, options, progress)


def quantize(
    src: PathName,
    dst: PathName,
    *,
    calibration: Text | None = None,
    imatrix: PathName | None = None,
    options: QuantizeOptions | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantizes the model `src` (F32, F16 or BF16 GGUF) into `dst`.

    `calibration` is the path of a text file, or strings of text; `imatrix` an importance matrix for the same model,
    used where no text is given. Without both, all activations count alike, which costs quality and is reported.
    Raises InputError, FormatError or OutputError; `dst` is untouched then.
    """
    options, progress = options or QuantizeOptions(), progress or _silent
    with open_model(src) as reader, _torch_threads(options.threads), ExitStack() as stack:
        check_source(reader)
        if calibration is not None and not isinstance(calibration, (str, os.PathLike)):
            calibration = list(calibration)  # it may be read twice
        plans = _plans(reader, calibration, imatrix, options, progress)
        wanted = {p.source.name: p.source for p in plans if p.type_name == blocks.TYPE_NAME}
        if calibration is not None and wanted:
            guide = _from_text(stack, reader, plans, calibration, options, Path(dst), progress)
        elif imatrix is not None and wanted:
            guide = _from_imatrix(wanted, imatrix)
        else:
            guide = _unguided(wanted)
        return _write(reader, Path(dst), plans, guide, options, progress)


@contextmanager
def _torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or default_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


# what guides the quantization


@dataclass(frozen=True)
class _Group:
    """Weights with the same input, and the norm that makes it where factors may be moved between them."""

    names: tuple[str, ...]
    stats: WeightStats | None = None
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Guide:
    """Where statistics come from. `groups` yields the weights to quantize, those with the same input together.

    What `refined` yields needs no statistics any more; its norms take the place of the file's.
    """

    origin: str
    groups: Iterator[_Group]
    warnings: list[str]
    journal: Journal = field(default_factory=lambda: Journal(None))
    refined: Refined | None = None


def _unguided(wanted: dict[str, Tensor]) -> _Guide:
    if not wanted:
        return _Guide("none", iter(()), ["no tensor of this model can be AGQ4"])
    warning = "quantized without calibration: all activations count alike; a text file gives better results"
    return _Guide("none", (_Group((name,)) for name in wanted), [warning])


def _from_imatrix(wanted: dict[str, Tensor], path: PathName) -> _Guide:
    stats = load_imatrix(path)
    check_shapes(stats, {name: tensor.shape for name, tensor in wanted.items()}, str(path))
    warnings = _unseen([name for name in wanted if name not in stats and name != EMBEDDING])
    return _Guide(f"imatrix {Path(path).name}", (_Group((name,), stats.get(name)) for name in wanted), warnings)


def _from_text(
    stack: ExitStack,
    reader: Reader,
    plans: list[TensorPlan],
    text: Text,
    options: QuantizeOptions,
    dst: Path,
    progress: Progress,
) -> _Guide:
    from agq_gguf.calibrate import Calibrator, read_text
    from agq_gguf.refined import Refined, Setting, refine

    progress("calibrate", 0, 1, "loading the model")
    wanted = [p.source.name for p in plans if p.type_name == blocks.TYPE_NAME]
    calibrator = stack.enter_context(
        Calibrator(
            reader.path,
            read_text(text),
            {name: reader.tensors[name].shape for name in wanted},
            context=options.context,
            max_tokens=options.calibration_tokens,
            threads=options.threads,
        )
    )
    journal = Journal(None)
    if options.resume:
        decisive = replace(options, threads=0, resume=False, split_size=0)
        journal = Journal(folder_of(dst), digest(reader, calibrator.chunks, f"{__version__} {decisive}"))
    warnings, refined = [], None
    if options.quality == "best":
        setting = Setting(options.matrix, options.memory, options.tune, journal, progress)
        found = refine(reader, calibrator, plans, setting)
        if isinstance(found, Refined):
            refined = found
            wanted = [name for name in wanted if name not in refined.names]
        else:
            warnings.append(f"quality best is not to be had for this model, balanced was used: {found}")
    hessians = options.matrix.error_feedback
    left = set(wanted)
    parts = [
        [found for found in part if left.intersection(found.weights)]
        for part in calibrator.passes(options.memory, hessians)
    ]
    seen = {name for part in parts for found in part for name in found.weights}
    unseen = [name for name in wanted if name not in seen]

    def groups() -> Iterator[_Group]:
        total = calibrator.n_tokens * len(parts)
        for i, part in enumerate(parts):
            before, detail = i * calibrator.n_tokens, f"pass {i + 1} of {len(parts)}"
            report = partial(_report, progress, before, total, detail)
            yield from (_Group(found.weights) for found in part if journal.has(found.weights))
            part = [found for found in part if not journal.has(found.weights)]
            if part:
                collected = calibrator.collect(part, options.memory, report, hessians)
                for found, stats in zip(part, collected, strict=True):
                    yield _Group(found.weights, stats, found.norms if _plain(reader, found.norms) else ())
        yield from (_Group((name,)) for name in unseen)

    source = Path(text).name if isinstance(text, (str, os.PathLike)) else "text"
    warnings += _unseen([name for name in unseen if name != EMBEDDING])  # a table to look up multiplies with nothing
    if hessians and (pooled := calibrator.pooled(options.memory)):
        warnings.append(
            f"the experts of {len(pooled)} tensors share their statistics; more memory would keep them apart"
        )
    if calibrator.n_tokens < _FEW_TOKENS:
        warnings.append(f"calibrated on {calibrator.n_tokens} tokens only; {_FEW_TOKENS} or more give better results")
    return _Guide(f"{source}, {calibrator.n_tokens} tokens", groups(), warnings, journal, refined)


def _plain(reader: Reader, norms: tuple[str, ...]) -> bool:
    """Whether factors can be moved out of these tensors exactly."""
    return all(name in reader.tensors and reader.tensors[name].type_name == "f32" for name in norms)


def _report(progress: Progress, before: int, total: int, detail: str, done: int) -> None:
    progress("calibrate", before + done, total, detail)


def _unseen(names: list[str]) -> list[str]:
    """A warning about the weights that got no statistics."""
    if not names:
        return []
    which = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"no activations were seen for {len(names)} tensors ({which}): there, all activations count alike"]


# writing


def _write(
    reader: Reader, dst: Path, plans: list[TensorPlan], guide: _Guide, options: QuantizeOptions, progress: Progress
) -> Report:
    placed = layout((p.source.name, p.type_name, p.source.shape) for p in plans)
    total = sum(p.source.n_elements for p in plans)
    done = 0
    results: dict[str, _Quantized] = {}
    added = _metadata(plans, guide.origin, options)
    with Writer(dst, reader.metadata, added, placed, split=options.split_size) as writer:
        _check_targets(writer.paths, reader)
        norms: dict[str, NDArray[np.float32]] = {}  # that take the place of the file's

        def finish(name: str, result: _Quantized) -> None:
            nonlocal done
            writer.write(name, result.parts)
            results[name] = result
            done += reader.tensors[name].n_elements

        if guide.refined is not None:
            for name, matrix in guide.refined.results:
                finish(name, _Quantized([blocks.pack(matrix.matrix)], matrix.error, matrix.note))
            norms |= guide.refined.norms
            guide.warnings.extend(guide.refined.notes)
        for group in guide.groups:
            progress("quantize", done, total, group.names[0])
            made = _finished(guide.journal, group.names)
            if made is None:
                made = _quantize_group(reader, group, options.matrix)
                _keep(guide.journal, made)
            norms |= made.norms
            for name, result in made.matrices.items():
                finish(name, result)
        for p in plans:
            if p.type_name != blocks.TYPE_NAME:
                name = p.source.name
                if name in norms:
                    writer.write(name, [norms[name]])
                elif p.type_name == p.source.type_name:
                    writer.write(name, reader.chunks(name))
                else:
                    writer.write(name, _stock(reader, p.source, p.type_name))
                done += p.source.n_elements
                progress("quantize", done, total, name)
        reader.check_unchanged()
        if results:
            writer.replace(ERROR_VALUES, np.array([results[name].error for name in added[ERROR_TENSORS]], np.float32))
        progress("quantize", done, total, "")
    guide.journal.close()
    reports = []
    for p, target in zip(plans, placed, strict=True):
        found = results.get(p.source.name)
        error, note = (found.error, found.note) if found else (None, "")
        reason = f"{p.reason}; {REPLACED}" if p.source.name in norms else p.reason
        reports.append(TensorReport(target.name, p.type_name, target.n_elements, target.n_bytes, reason, error, note))
    return Report(reports, writer.n_bytes, guide.origin, guide.warnings, writer.paths)


def _check_targets(targets: list[Path], reader: Reader) -> None:
    for target in targets:
        if target.exists() and any(target.samefile(source) for source in paths_of(reader)):
            raise InputError(f"{target}: is the model that is read; write to another file")


@dataclass(frozen=True)
class _Quantized:
    parts: list[NDArray[np.uint8]]  # a matrix each
    error: float
    note: str


@dataclass(frozen=True)
class _Made:
    """What became of a group."""

    matrices: dict[str, _Quantized]
    norms: dict[str, NDArray[np.float32]]


def _finished(journal: Journal, names: tuple[str, ...]) -> _Made | None:
    """What an earlier run has made of these weights, if it has finished all of them."""
    made = _Made({}, {})
    for name in names:
        kept = journal.get(name)
        if kept is None:
            return None
        made.matrices[name] = _Quantized(list(kept["parts"]), float(kept["error"]), str(kept["note"]))
        made.norms.update({key[5:]: value for key, value in kept.items() if key.startswith("norm ")})
    return made


def _keep(journal: Journal, made: _Made) -> None:
    norms = {f"norm {name}": norm for name, norm in made.norms.items()}
    for name, result in made.matrices.items():
        journal.put(name, {"parts": result.parts, "error": result.error, "note": result.note, **norms})


def _quantize_group(reader: Reader, group: _Group, options: MatrixOptions) -> _Made:
    """Quantizes weights that share an input, expert by expert, so that what belongs to the input is prepared once."""
    names, stats = group.names, group.stats
    shapes = [reader.tensors[name].shape for name in names]
    experts = shapes[0][0] if len(shapes[0]) == 3 else 1
    capacity = min(blocks.listable(*shape[-2:]) for shape in shapes)
    found: dict[str, list[QuantizedMatrix]] = {name: [] for name in names}
    packed: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in names}
    columns, norms = None, {}
    if stats is not None and group.norms and options.equalize:
        every = [reader.read(name).reshape(-1, shapes[0][-1]) for name in names]
        columns = equalize.choose(
            stats.whole, every, capacity, options.activation_bits, options.activation_scale, options.refine
        )
    if stats is not None and columns is not None:
        stats = equalize.scaled(stats, columns)
        norms = {name: reader.read(name) / columns for name in group.norms}
    for expert in range(experts):
        if expert == 0 or (stats is not None and stats.experts):
            prepared = prepare_input(stats.of(expert) if stats else None, shapes[0][-1], capacity, options)
        for name, shape in zip(names, shapes, strict=True):
            rows = range(expert * shape[-2], (expert + 1) * shape[-2])
            weight = reader.read(name, rows)
            result = quantize_matrix(weight if columns is None else weight * columns, prepared, options, name)
            packed[name].append(blocks.pack(result.matrix))
            found[name].append(result)
    matrices = {
        name: _Quantized(
            packed[name],
            float(np.mean([result.error for result in found[name]])),
            "; ".join(sorted({result.note for result in found[name] if result.note})),
        )
        for name in names
    }
    return _Made(matrices, norms)


def _stock(reader: Reader, tensor: Tensor, type_name: str) -> Iterator[NDArray[Any]]:
    """The rows of a tensor in a stock type, some at a time."""
    n_rows = tensor.n_elements // tensor.shape[-1]
    for begin in range(0, n_rows, _STOCK_ROWS):
        rows = reader.read(tensor.name, range(begin, min(begin + _STOCK_ROWS, n_rows)))
        yield stock.quantize(rows, type_name)


def _metadata(plans: list[TensorPlan], guidance: str, options: QuantizeOptions) -> dict[str, Any]:
    counts = Counter(p.type_name for p in plans)
    names = [p.source.name for p in plans if p.type_name == blocks.TYPE_NAME]
    errors = {ERROR_TENSORS: names, ERROR_VALUES: np.zeros(len(names), np.float32)} if names else {}
    return {
        "general.quantization_version": 2,  # ggml's GGML_QNT_VERSION, which stock quantized files carry
        "general.file_type": 100 + blocks.TYPE_ID,  # no stock number; programs show it as unknown
        "agq.version": blocks.VERSION,
        "agq.calibration": guidance,
        "agq.quality": options.quality,
        "agq.activation_bits": options.matrix.activation_bits,
        "agq.activation_scale": options.matrix.activation_scale,
        **{f"agq.tensors.{type_name}": n for type_name, n in sorted(counts.items())},
        **errors,
    }
