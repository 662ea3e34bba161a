"""Results as tables on stdout; part of the command line, see `cli.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from agq_gguf import cli_output as show
from agq_gguf.cli_prune import show_pruning

if TYPE_CHECKING:
    from agq_gguf.bench import Result, Speed
    from agq_gguf.convert import Report, TensorReport
    from agq_gguf.demo import Demonstration
    from agq_gguf.evaluate import Evaluation
    from agq_gguf.inspection import ModelInfo, TensorInfo
    from agq_gguf.profile import NodeTime
    from agq_gguf.recipe import TensorPlan


def show_plan(plans: list[TensorPlan]) -> None:
    """What would become of each tensor."""
    from agq_gguf.writer import layout

    placed = layout((plan.source.name, plan.type_name, plan.source.shape) for plan in plans)
    total = sum(target.n_bytes for target in placed)
    rows = []
    for plan, target in zip(plans, placed, strict=True):
        shape = " x ".join(map(str, plan.source.shape))
        rows.append(
            [plan.source.name, shape, plan.source.type_name, plan.type_name, show.size(target.n_bytes), plan.reason]
        )
    show.table(["tensor", "shape", "from", "to", ">size", "reason"], rows)
    elements = sum(plan.source.n_elements for plan in plans)
    show.say(f"{show.size(total)}, {8 * total / elements:.2f} bits per weight; nothing was written")


def show_report(report: Report) -> None:
    """What became of the tensors, and which could not be AGQ4."""
    by_type = [
        [name, count, show.size(n_bytes), f"{bits:.2f}"] for name, (count, n_bytes, bits) in report.by_type().items()
    ]
    show.table(["type", ">tensors", ">size", ">bits per weight"], by_type)
    reasons: dict[tuple[str, str], list[str]] = {}
    for tensor in report.tensors:
        if tensor.reason:
            reasons.setdefault((tensor.type_name, tensor.reason), []).append(tensor.name)
    if reasons:
        rows = [[name, len(names), reason, _some(names)] for (name, reason), names in reasons.items()]
        show.table(["not AGQ4", ">tensors", "why", "which"], rows)
    worst = sorted((t for t in report.tensors if t.error is not None), key=lambda t: -(t.error or 0))
    if worst:
        rows = [[kind, f"{min(errors):.3%}", f"{_median(errors):.3%}", f"{max(errors):.3%}", name]
                for kind, (errors, name) in _by_kind(worst).items()]  # fmt: skip
        show.table(["error of the output", ">least", ">median", ">most", "in"], rows)
    for tensor in report.tensors:
        if tensor.note:
            show.complain(f"note: {tensor.name}: {tensor.note}")
    for warning in report.warnings:
        show.complain(f"warning: {warning}")
    files = f" in {len(report.paths)} files" if len(report.paths) > 1 else ""
    show.say(f"{report.paths[0]}: {show.size(report.n_bytes)}{files}, {report.bits_per_weight:.2f} bits per weight")


def _by_kind(worst: list[TensorReport]) -> dict[str, tuple[list[float], str]]:
    """Kind of tensor -> its errors and the name of the worst; `worst` is sorted that way."""
    found: dict[str, tuple[list[float], str]] = {}
    for tensor in worst:
        kind = re.sub(r"^blk\.\d+\.|\.weight$", "", tensor.name)
        found.setdefault(kind, ([], tensor.name))[0].append(tensor.error or 0.0)
    return found


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def show_model(info: ModelInfo) -> None:
    """What is in a file."""
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
    """One line about the parameters inside an AGQ4 tensor."""
    if tensor.problem:
        return f"DAMAGED: {tensor.problem}"
    found = tensor.agq
    if found is None:
        return ""
    experts = f"{found.matrices} experts, " if found.matrices > 1 else ""
    pruning = f", drops tokens with {found.pruning.score} < {found.pruning.threshold:.4g}" if found.pruning else ""
    activations = f"{experts}{found.activation_bits}-bit activations, scale: {found.activation_scale}"
    refined = ""
    if found.exponent_max or found.listed_channels:
        refined = (
            f", exponents {found.exponent_min}..{found.exponent_max} ({found.exponents_nonzero:.0%} refined), "
            f"order of {found.listed_channels}"
        )
    return activations + refined + pruning


def show_evaluation(found: Evaluation) -> None:
    """The figures of a comparison."""
    show.table(
        ["", ">value"],
        [
            ["perplexity", f"{found.perplexity:.4f}"],
            ["perplexity of the reference", f"{found.reference_perplexity:.4f}"],
            ["KL divergence, mean", f"{found.mean_kl:.6f} ± {found.mean_kl_error:.6f}"],
            ["KL divergence, median", f"{found.median_kl:.6f}"],
            ["KL divergence, 99.9%", f"{found.kl_999:.6f}"],
            ["KL divergence, maximum", f"{found.max_kl:.6f}"],
            ["same likeliest token", f"{found.top1_agreement:.2%}"],
        ],
    )
    show.say(f"{found.positions} positions scored, in {found.chunks} chunks of {found.context} tokens")


def show_bench(results: list[Result]) -> None:
    """Speeds, one line for each model."""
    columns = ["model", ">file"]
    for part in ("prompt", "generation"):
        speed = getattr(results[0], part)
        columns += [f">{part} {speed.tokens if speed else 0}", ">ratio"]
    columns += [">memory", ">first token"]
    show.table(columns, [_bench_row(result) for result in results])


def _bench_row(result: Result) -> list[str]:
    start = result.start
    memory = show.size(start.resident_bytes) if start and start.resident_bytes is not None else "-"
    first = f"{start.first_token_seconds:.3f} s" if start else "-"
    speeds = [cell for speed in (result.prompt, result.generation) for cell in _speed(speed)]
    return [Path(result.model).name, show.size(result.file_bytes), *speeds, memory, first]


def _speed(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "-", "-"
    low, high = speed.quartiles
    spread = (high - low) / 2 / speed.median
    return f"{speed.median:.{0 if speed.median >= 1000 else 1}f} ± {spread:.0%}", f"{speed.ratio:.2f}"


def show_profiles(results: list[Result]) -> None:
    """Where the time goes, for results that know."""
    for result in results:
        for part, times in (("prompt", result.prompt_profile), ("generation", result.generation_profile)):
            if times:
                show.say(f"\n{Path(result.model).name}, {part}")
                show.table(["node", ">nodes", ">ms", ">share"], _profile_rows(times))


def _profile_rows(times: list[NodeTime]) -> list[list[str]]:
    total = sum(time.seconds for time in times)
    rows = [[t.kind, str(t.nodes), f"{t.seconds * 1e3:.1f}", f"{t.seconds / total:.1%}"] for t in times]
    return [*rows, ["all", str(sum(t.nodes for t in times)), f"{total * 1e3:.1f}", "100.0%"]]


def show_demonstration(shown: Demonstration) -> None:
    """The text and the one table."""
    show.say(f"\nThe AGQ4 model, asked to continue {shown.prompt!r}:\n\n{shown.text}\n")
    show.table(
        ["model", ">file", ">bits per weight", ">KL to F16", ">perplexity", ">prompt tokens/s", ">generation tokens/s"],
        [
            [
                row.name,
                show.size(row.file_bytes),
                f"{row.bits_per_weight:.2f}",
                f"{row.mean_kl:.5f}",
                f"{row.perplexity:.3f}",
                f"{row.prompt_speed:.0f}",
                f"{row.generation_speed:.0f}",
            ]
            for row in shown.rows
        ],
    )
