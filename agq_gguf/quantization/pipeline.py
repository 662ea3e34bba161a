"""The pipeline from a float GGUF to an AGQ4 GGUF, in reading order; the only module that calls every stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from agq_gguf.arguments import PathName, Progress, Text, no_progress
from agq_gguf.calibration.imatrix import Imatrix
from agq_gguf.errors import HostError, InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io import metadata
from agq_gguf.gguf_io.reader import Reader, Tensor
from agq_gguf.gguf_io.shards import open_model, paths_of
from agq_gguf.gguf_io.writer import Writer, check_writable, layout
from agq_gguf.matrix import equalize, stock_types, typed
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization import folder, own_codes, source
from agq_gguf.quantization.guidance import Group, Guide, falling_back, from_imatrix, from_text, unguided
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.presets import saved_by_small
from agq_gguf.quantization.report import REPLACED, Report, TensorReport
from agq_gguf.quantization.resume import Journal
from agq_gguf.quantization.type_plan import TensorPlan, no_larger, plan
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.text import LoadedText, load_text

if TYPE_CHECKING:
    from agq_gguf.calibration.session import Session

# What a weight costs, compared with the search of codes for a narrow AGQ4 matrix. Error feedback between columns costs
# as much again with so many columns.
_CONVERTED, _COPIED, _WIDE = 1 / 16, 1 / 64, 2000

_STOCK_ROWS = 4096  # rows converted at one time, which limits memory use


def plan_file(
    src: PathName,
    options: QuantizeOptions | None = None,
    *,
    calibration: Text | None = None,
    imatrix: PathName | None = None,
    progress: Progress = no_progress,
) -> list[TensorPlan]:
    """What `quantize` would do with each tensor, without doing it. Text and imatrix matter only with a target size."""
    options = options or QuantizeOptions()
    if Path(src).is_dir():
        raise InputError(
            f"{src}: is a folder; a plan needs a GGUF file: make one with `agq-gguf import-hf` or llama.cpp's converter"
        )
    stats = None if imatrix is None else Imatrix.read(imatrix)
    with open_model(src) as reader, _torch_of(options), ExitStack() as stack:
        source.prepare(reader, options)
        if stats is not None:
            stats.check(reader)
        text = None if calibration is None or not options.target_bpw else load_text(calibration)
        session, _ = _opener(stack, reader, text, progress)
        return _plans(reader, session, stats, options, progress)


def plan_warnings(src: PathName, options: QuantizeOptions) -> list[str]:
    """What `quantize` would warn of before the work begins: that `best` does not support the model, and why.

    For that the model runs a few tokens in llama.cpp and in PyTorch.
    """
    if options.quality != "best":
        return []
    from agq_gguf.graphs.support import supported

    with _torch_of(options):
        reason = supported(src, lambda reader: source.prepare(reader, options))
    return [falling_back(reason)] if reason else []


def _plans(
    reader: Reader,
    session: Callable[[], Session] | None,
    imatrix: Imatrix | None,
    options: QuantizeOptions,
    progress: Progress,
) -> list[TensorPlan]:
    if options.target_bpw:
        from agq_gguf.quantization.budget.choose import choose_types

        chosen = choose_types(reader, session, imatrix, options, progress)
        plans = [no_larger(p, options.keep_types) for p in chosen]
    else:
        plans = plan(
            reader,
            output_type=options.output_type,
            embedding_type=options.embedding_type,
            keep_types=options.keep_types,
        )
    return own_codes.marked(reader, plans)


def quantize(
    src: PathName,
    dst: PathName,
    *,
    calibration: Text | None = None,
    imatrix: PathName | None = None,
    options: QuantizeOptions | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Quantizes the model `src` into `dst`.

    `src` is a GGUF in F32, F16 or BF16, of any type with `options.allow_requantize`, or the folder of a Hugging Face
    checkpoint.

    `calibration` is the path of a text file, strings of text, or what `default_calibration` or `mix_texts` returned.
    `imatrix` is an importance matrix for the same model; it is used if no text is given. Without both, all activations
    get the same weight, which costs quality and causes a warning: unlike the command, this function has no default
    text. Raises InputError, FormatError or OutputError, and then leaves `dst` unchanged.
    """
    options = options or QuantizeOptions()
    stats = None if imatrix is None else Imatrix.read(imatrix)
    with folder.as_gguf(src, dst, options, progress) as (path, warnings):
        report = _quantize_file(path, dst, calibration, stats, options, progress)
        report.warnings[:0] = warnings
        return report


def _quantize_file(
    src: Path,
    dst: PathName,
    calibration: Text | None,
    imatrix: Imatrix | None,
    options: QuantizeOptions,
    progress: Progress,
) -> Report:
    with open_model(src) as reader, _torch_of(options), ExitStack() as stack:
        source.prepare(reader, options)
        weights = sum(tensor.n_elements for tensor in reader.tensors.values())
        options = replace(options, calibration_tokens=options.tokens_for(weights))
        if imatrix is not None:
            imatrix.check(reader)
        check_writable(dst)
        text = None if calibration is None else load_text(calibration)
        session, warnings = _opener(stack, reader, text, progress)
        plans = _plans(reader, session, imatrix, options, progress)
        wanted = [p for p in plans if p.searched]
        guide: Guide | None = None
        if text is not None and session is not None and wanted:
            try:
                guide = from_text(stack, reader, plans, session(), text.name, options, Path(dst), progress)
            except (InputError, HostError) as e:
                if not text.optional:
                    raise
                warnings.append(f"{text.name} was not used: {e}")
        if guide is None:
            guide = unguided(wanted) if imatrix is None or not wanted else from_imatrix(wanted, imatrix)
        guide.warnings[:0] = [*source.warnings_about(plans), *warnings]
        return _write(reader, Path(dst), plans, guide, options, progress)


def _opener(
    stack: ExitStack, reader: Reader, text: LoadedText | None, progress: Progress
) -> tuple[Callable[[], Session] | None, list[str]]:
    """A function that opens the model with its text at the first call and returns the same session at later calls.

    An optional text is tried at once. If the model cannot read it there is no function, but a warning.
    """
    if text is None:
        return None, []
    from agq_gguf.calibration.session import Session

    @cache
    def session() -> Session:
        progress("calibrate", 0, 1, "loading the model")
        return stack.enter_context(Session(reader.path, text))

    try:
        if text.optional:
            session()
    except (InputError, HostError) as e:
        return None, [f"{text.name} was not used: {e}"]
    return session, []


@contextmanager
def _torch_of(options: QuantizeOptions) -> Iterator[None]:
    """PyTorch with the threads of the options. Raises InputError if their device is missing."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA device here; use --device cpu, or install a PyTorch for CUDA")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or default_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


# writing


def _write(
    reader: Reader, dst: Path, plans: list[TensorPlan], guide: Guide, options: QuantizeOptions, progress: Progress
) -> Report:
    placed = layout((p.source.name, p.type_name, p.source.shape) for p in plans)
    total = sum(p.source.n_elements for p in plans)
    costs = _costs(plans)
    done = 0.0
    results: dict[str, _Quantized] = {}
    added = _metadata(plans, guide, options)
    with Writer(dst, reader.metadata, added, placed, split=options.split_size) as writer:
        _check_targets(writer.paths, reader)
        norms: dict[str, NDArray[np.float32]] = {}  # these replace the norms of the file

        def finish(name: str, result: _Quantized) -> None:
            nonlocal done
            writer.write(name, result.parts)
            results[name] = result
            done += costs[name]

        if guide.best is not None:
            outcome = guide.best.run(lambda name, made: finish(name, _Quantized.of(made)))
            norms |= outcome.norms
            guide.warnings.extend(outcome.notes)
        for group in guide.groups:
            progress("quantize", int(done), total, group.names[0])
            made = _finished(guide.journal, group)
            if made is None:
                made = _quantize_group(reader, group, options.matrix)
                _keep(guide.journal, group, made)
            norms |= made.norms
            for name, result in made.matrices.items():
                finish(name, result)
        for p in plans:
            name = p.source.name
            if p.own_codes:
                finish(name, _Quantized.of(own_codes.read(reader, p.source, options.matrix)))
                progress("quantize", int(done), total, name)
            elif not p.searched:
                if name in norms:
                    writer.write(name, [norms[name]])
                elif p.type_name == p.source.type_name:
                    writer.write(name, reader.chunks(name))
                else:
                    writer.write(name, _stock(reader, p.source, p.type_name))
                done += costs[name]
                progress("quantize", int(done), total, name)
        reader.check_unchanged()
        errors = {p.source.name: results[p.source.name].error for p in plans if p.type_name == blocks.TYPE_NAME}
        for key, value in metadata.error_table(errors).items():
            writer.replace(key, value)
        progress("quantize", total, total, "")
    guide.journal.close()
    reports = []
    for p, target in zip(plans, placed, strict=True):
        found = results.get(p.source.name)
        error, note = (found.error, found.note) if found else (None, "")
        reason = f"{p.reason}; {REPLACED}" if p.source.name in norms else p.reason
        reports.append(TensorReport(target.name, p.type_name, target.n_elements, target.n_bytes, reason, error, note))
    saved = saved_by_small(reader, plans, options)
    return Report(
        reports,
        writer.n_bytes,
        guide.origin,
        guide.warnings,
        writer.paths,
        sum(path.stat().st_size for path in paths_of(reader)),
        writer.n_bytes - saved if saved else 0,
    )


def _costs(plans: Sequence[TensorPlan]) -> dict[str, float]:
    """What each tensor costs, in weights of the model: so the time left can be told from what is done."""
    costs = {}
    for p in plans:
        if p.searched:
            each = 1 + p.source.shape[-1] / _WIDE
        else:
            each = _COPIED if p.type_name == p.source.type_name else _CONVERTED
        costs[p.source.name] = p.source.n_elements * each
    scale = sum(p.source.n_elements for p in plans) / sum(costs.values())
    return {name: cost * scale for name, cost in costs.items()}


def _check_targets(targets: list[Path], reader: Reader) -> None:
    for target in targets:
        if target.exists() and any(target.samefile(source) for source in paths_of(reader)):
            raise InputError(f"{target}: is the source model; write to another file")


@dataclass(frozen=True)
class _Quantized:
    parts: list[NDArray[np.uint8]]  # one for each matrix
    error: float
    note: str

    @classmethod
    def of(cls, made: Sequence[typed.Quantized]) -> _Quantized:
        """A tensor of these matrices: one, or one for each expert."""
        notes = sorted({found.note for found in made if found.note})
        return cls([found.packed for found in made], float(np.mean([found.error for found in made])), "; ".join(notes))


@dataclass(frozen=True)
class _Made:
    """Result for one group."""

    matrices: dict[str, _Quantized]
    norms: dict[str, NDArray[np.float32]]


def _finished(journal: Journal, group: Group) -> _Made | None:
    """The result of an earlier run for a group, if it finished all of it."""
    made = _Made({}, {})
    for name in group.names:
        kept = journal.get(group.key(name))
        if kept is None:
            return None
        made.matrices[name] = _Quantized(list(kept["parts"]), float(kept["error"]), str(kept["note"]))
        made.norms.update({key[5:]: value for key, value in kept.items() if key.startswith("norm ")})
    return made


def _keep(journal: Journal, group: Group, made: _Made) -> None:
    norms = {f"norm {name}": norm for name, norm in made.norms.items()}
    for name, result in made.matrices.items():
        journal.put(group.key(name), {"parts": result.parts, "error": result.error, "note": result.note, **norms})


def _quantize_group(reader: Reader, group: Group, options: MatrixOptions) -> _Made:
    """Quantizes weights that share an input, expert by expert; the input is prepared once for all of a type."""
    names, stats = group.names, group.stats
    shapes = {name: reader.tensors[name].shape for name in names}
    experts, width = reader.tensors[names[0]].n_matrices, shapes[names[0]][-1]
    capacity = min(blocks.listable(*shape[-2:]) for shape in shapes.values())
    found: dict[str, list[typed.Quantized]] = {name: [] for name in names}
    columns, norms = None, {}
    if stats is not None and group.norms and options.equalize:
        every = [(group.types[name], reader.read(name).reshape(-1, width)) for name in names]
        columns = equalize.choose(
            stats.whole, every, capacity, options.activation_bits, options.activation_scale, options.refine
        )
    if stats is not None and columns is not None:
        stats = equalize.scaled(stats, columns)
        norms = {name: reader.read(name) / columns for name in group.norms}
    types = typed.in_order(group.types.values())
    for type_name in types:
        prepared: typed.Prepared | None = None
        for expert in range(experts):
            if prepared is None or (stats is not None and stats.experts):
                prepared = None  # is large: the next one needs its place
                own, last = stats.of(expert) if stats else None, type_name == types[-1]
                prepared = typed.prepare(type_name, own, width, capacity, options, consume=last)
            for name in names:
                if group.types[name] != type_name:
                    continue
                rows = shapes[name][-2]
                weight = reader.read(name, range(expert * rows, (expert + 1) * rows))
                weight = weight if columns is None else weight * columns
                found[name].append(typed.quantize(weight, prepared, options, name))
    matrices = {name: _Quantized.of(made) for name, made in found.items()}
    return _Made(matrices, norms)


def _stock(reader: Reader, tensor: Tensor, type_name: str) -> Iterator[NDArray[Any]]:
    """The rows of a tensor in a stock type, in blocks."""
    n_rows = tensor.n_elements // tensor.shape[-1]
    for begin in range(0, n_rows, _STOCK_ROWS):
        rows = reader.read(tensor.name, range(begin, min(begin + _STOCK_ROWS, n_rows)))
        yield stock_types.quantize(rows, type_name)


def _metadata(plans: list[TensorPlan], guide: Guide, options: QuantizeOptions) -> dict[str, Any]:
    counts = Counter(p.type_name for p in plans)
    names = [p.source.name for p in plans if p.type_name == blocks.TYPE_NAME]
    return {
        "general.quantization_version": 2,  # ggml's GGML_QNT_VERSION, which stock quantized files carry
        "general.file_type": 100 + blocks.TYPE_ID,  # no stock number; programs show it as unknown
        metadata.VERSION: blocks.VERSION,
        metadata.CALIBRATION: guide.origin,
        metadata.QUALITY: "balanced" if options.quality == "best" and guide.best is None else options.quality,
        metadata.ACTIVATION_BITS: options.matrix.activation_bits,
        metadata.ACTIVATION_SCALE: options.matrix.activation_scale,
        **({metadata.REQUANTIZED_FROM: ", ".join(types)} if (types := source.lossy_types(plans)) else {}),
        **{f"{metadata.TENSOR_COUNT}{type_name}": n for type_name, n in sorted(counts.items())},
        **metadata.error_table(dict.fromkeys(names, 0.0)),
    }
