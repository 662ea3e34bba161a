"""The source of the statistics that guide the quantization: a text, an importance matrix, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agq_gguf._version import __version__
from agq_gguf.arguments import Progress
from agq_gguf.calibration.imatrix import Imatrix
from agq_gguf.calibration.memory import hessian_bytes, work_bytes
from agq_gguf.calibration.stats import WeightStats
from agq_gguf.gguf_io.reader import Reader
from agq_gguf.gguf_io.tensor_names import EMBEDDING, is_further_prediction, layer_of
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.resume import Journal, digest, folder_of
from agq_gguf.quantization.type_plan import TensorPlan

if TYPE_CHECKING:
    from agq_gguf.calibration.collect import Calibrator, Input
    from agq_gguf.calibration.session import Session
    from agq_gguf.quantization.best.run import BestRun


_FEW_TOKENS = 4096  # of calibration text; fewer cause a warning
_NAMED_EXPERTS = 4  # in a warning about experts that were never used


@dataclass(frozen=True)
class Group:
    """Weights that share an input, and the norm that produces it if factors may be moved between them."""

    types: Mapping[str, str]  # the type of each weight
    stats: WeightStats | None = None
    norms: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The weights."""
        return tuple(self.types)

    def key(self, name: str) -> str:
        """Under which a journal keeps the result for a weight: it depends on the whole group."""
        return f"{name} as {self.types[name]} of {' '.join(self.names)}, {' '.join(self.norms)}"

    @property
    def keys(self) -> list[str]:
        """The keys of all weights."""
        return [self.key(name) for name in self.names]


@dataclass(frozen=True)
class Guide:
    """Source of the statistics. `groups` yields the weights to quantize, grouped by their input.

    The weights that `best` quantizes are not in `groups`; its norms replace those of the file.
    """

    origin: str
    groups: Iterator[Group]
    warnings: list[str]
    journal: Journal = field(default_factory=lambda: Journal(None))
    best: BestRun | None = None


def unguided(wanted: list[TensorPlan]) -> Guide:
    """No statistics: all activations get the same weight."""
    if not wanted:
        return Guide("none", iter(()), [])
    warning = (
        "quantized without calibration: all activations got the same weight; a calibration text gives better results"
    )
    return Guide("none", (Group({plan.source.name: plan.type_name}) for plan in wanted), [warning])


def from_imatrix(wanted: list[TensorPlan], imatrix: Imatrix) -> Guide:
    """Mean squares from an importance matrix, which must match the weights."""
    stats, types = imatrix.weights, {plan.source.name: plan.type_name for plan in wanted}
    warnings = _unseen([name for name in types if name not in stats and name != EMBEDDING])
    warnings += unused_experts({name: stats[name].unused_experts for name in types if name in stats})
    groups = (Group({name: type_name}, stats.get(name)) for name, type_name in types.items())
    return Guide(f"imatrix {imatrix.path.name}", groups, warnings)


def from_text(
    stack: ExitStack,
    reader: Reader,
    plans: list[TensorPlan],
    session: Session,
    source: str,
    options: QuantizeOptions,
    dst: Path,
    progress: Progress,
) -> Guide:
    """Statistics from a text, which llama.cpp runs while groups are quantized; `source` names the text in the report.

    `stack` closes everything that is opened here.
    """
    from agq_gguf.calibration.collect import Calibrator
    from agq_gguf.quantization.best.run import BestRun, Setting, prepare

    types = {p.source.name: p.type_name for p in plans if p.searched}
    wanted = list(types)
    calibrator = stack.enter_context(
        Calibrator(
            session,
            {name: reader.tensors[name].shape for name in wanted},
            context=options.context,
            max_tokens=options.calibration_tokens,
            threads=options.threads,
        )
    )
    journal = _journal(reader, calibrator, options, dst)
    warnings, best = [*session.warnings], None
    if options.quality == "best":
        setting = Setting(
            options.matrix, options.memory, options.tune, options.threads, options.device, journal, progress
        )
        found = prepare(reader, session, options.context, options.calibration_tokens, plans, setting)
        if isinstance(found, BestRun):
            best = found
            wanted = [name for name in wanted if name not in best.names]
        else:
            warnings.append(falling_back(found))
    hessians = options.matrix.error_feedback
    left = set(wanted)
    parts = [
        [found for found in part if left.intersection(found.weights)]
        for part in calibrator.passes(options.memory, hessians)
    ]

    def group(found: Input, stats: WeightStats | None = None) -> Group:
        of_weights = {name: types[name] for name in found.weights}
        return Group(of_weights, stats, found.norms if _plain(reader, found.norms) else ())

    seen = {name for part in parts for found in part for name in found.weights}
    unseen = [name for name in wanted if name not in seen]

    unused: dict[str, Sequence[int]] = {}

    def groups() -> Iterator[Group]:
        total = calibrator.n_tokens * len(parts)
        for i, part in enumerate(parts):
            before, detail = i * calibrator.n_tokens, f"pass {i + 1} of {len(parts)}"
            report = partial(_report, progress, before, total, detail)
            yield from (group(found) for found in part if journal.has(group(found).keys))
            part = [found for found in part if not journal.has(group(found).keys)]
            if part:
                collected = calibrator.collect(part, options.memory, report, hessians)
                for found, stats in zip(part, collected, strict=True):
                    unused[found.weights[0]] = stats.unused_experts
                    yield group(found, stats)
        yield from (Group({name: types[name]}) for name in unseen)
        warnings.extend(unused_experts(unused))

    warnings += _unseen([name for name in unseen if name != EMBEDDING])  # an embedding that is looked up has no input
    if hessians and (pooled := left.intersection(calibrator.pooled(options.memory))):
        warnings.append(
            f"the experts of {len(pooled)} tensors share one set of statistics; "
            "a larger --memory gives each expert its own"
        )
    if hessians:
        warnings += _without_hessian(calibrator, options.memory)
    if calibrator.n_tokens < _FEW_TOKENS:
        warnings.append(f"calibrated on only {calibrator.n_tokens} tokens; {_FEW_TOKENS} or more give better results")
    return Guide(f"{source}, {calibrator.n_tokens} tokens", groups(), warnings, journal, best)


def _journal(reader: Reader, calibrator: Calibrator, options: QuantizeOptions, dst: Path) -> Journal:
    shares = bool(options.shared) and options.quality != "best"  # whose matrices depend on the types of all others
    if not options.resume and not shares:
        return Journal(None)
    # Tuning comes last and keeps nothing, so a run that was interrupted in it can go on without it.
    decisive = replace(
        options, threads=0, device="cpu", resume=False, shared="", tune=True, split_size=0, converter="", keep_float=""
    )
    if shares:
        decisive = replace(decisive, output_type="auto", embedding_type="auto", target_bpw=0, target_types=())
    key = digest(reader, calibrator.chunks, f"{__version__} {decisive}")
    return Journal(Path(options.shared) / "matrices", key, stays=True) if shares else Journal(folder_of(dst), key)


def _without_hessian(calibrator: Calibrator, memory: int) -> list[str]:
    """A warning about the weights whose Hessian does not fit into memory."""
    found = calibrator.too_large(memory)
    if not found:
        return []
    names = [name for one in found for name in one.weights]
    most = max(one.columns for one in found)
    needed = -(-(hessian_bytes(most) + work_bytes(most)) >> 20)
    return [
        f"{len(names)} tensors ({names[0]}, ...) get no error feedback between groups of columns: the Hessian of "
        f"{most} columns does not fit into {memory >> 20} MiB; --memory {needed}M includes it"
    ]


def falling_back(reason: str) -> str:
    """The warning that a model gets another quality than `best`."""
    return f'falling back to quality "balanced": "best" does not support this model ({reason})'


def _plain(reader: Reader, norms: tuple[str, ...]) -> bool:
    """Whether factors can be moved out of these tensors without rounding."""
    return all(name in reader.tensors and reader.tensors[name].type_name == "f32" for name in norms)


def _report(progress: Progress, before: int, total: int, detail: str, done: int) -> None:
    progress("calibrate", before + done, total, detail)


def _unseen(names: list[str]) -> list[str]:
    """Warnings about the weights that got no statistics."""
    apart = {layer_of(name) for name in names if is_further_prediction(name)}
    further = [name for name in names if layer_of(name) in apart and layer_of(name) is not None]
    others = [name for name in names if name not in further]
    warnings = []
    if further:
        blocks_of = ", ".join(f"blk.{layer}" for layer in sorted({layer_of(name) or 0 for name in further}))
        warnings.append(
            f"{len(further)} tensors of {blocks_of} were quantized without calibration: llama.cpp does not run blocks "
            "for multi-token prediction on a text"
        )
    if others:
        which = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        warnings.append(
            f"no activations were seen for {len(others)} tensors ({which}): they were quantized without calibration; "
            "use a calibration text that reaches them"
        )
    return warnings


def unused_experts(unused: Mapping[str, Sequence[int]]) -> list[str]:
    """A warning about experts that no token reached; `unused` lists them for each tensor."""
    found = sorted({(layer_of(name) or 0, expert) for name, experts in unused.items() for expert in experts})
    if not found:
        return []
    which = ", ".join(f"expert {expert} of blk.{layer}" for layer, expert in found[:_NAMED_EXPERTS])
    more = f" and {len(found) - _NAMED_EXPERTS} more experts" if len(found) > _NAMED_EXPERTS else ""
    return [
        f"{which}{more} {'was' if len(found) == 1 else 'were'} never used by the calibration data; they got the "
        "statistics of all experts; a longer text reaches more of them"
    ]
