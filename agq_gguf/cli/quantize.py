"""The command `quantize`."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq_gguf.calibration.default_text import default_calibration
from agq_gguf.cli import output as show
from agq_gguf.cli.options import Device, Json, Preset, Quality, Quiet, Threads, parse_size
from agq_gguf.cli.prune import prune_new, show_calibration
from agq_gguf.errors import AgqError, InputError, missing_package
from agq_gguf.gguf_io.tensor_names import kind_of
from agq_gguf.quantization.options import LARGER_TYPES, QuantizeOptions, activation_options
from agq_gguf.runtime.abilities import declared_problem
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.model import Model
from agq_gguf.text import LoadedText, mix_texts

if TYPE_CHECKING:
    from agq_gguf.quantization.estimate import Estimate
    from agq_gguf.quantization.report import Report, TensorReport
    from agq_gguf.quantization.type_plan import TensorPlan


def quantize(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="GGUF model in F32, F16 or BF16, or a Hugging Face checkpoint folder.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write; replaced only when complete.", show_default=False)
    ],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text file similar to what the model will read; may be given several times. `default`, used if no "
            "text and no --imatrix is given, is a text in the package; `none` leaves calibration out.",
            show_default=False,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix (GGUF) to use instead of a text.", show_default=False)
    ] = None,
    quality: Annotated[
        Quality, typer.Option(help="How much work to do; docs/quality.md compares the choices.")
    ] = Quality.balanced,
    preset: Annotated[
        Preset,
        typer.Option(
            help="Size of the file: small (all AGQ4), balanced (output matrix and small embeddings Q8_0) or "
            "near-lossless (7 bits per weight, where they matter most). Options for types and --target-bpw come first."
        ),
    ] = Preset.balanced,
    output_type: Annotated[
        str, typer.Option(help="Type of the output matrix: agq4, q6_K, q8_0, f16, f32 or auto (q8_0).")
    ] = "auto",
    embedding_type: Annotated[
        str,
        typer.Option(
            help="Type of the token embedding: agq4, q6_K, q8_0, f16, f32 or auto (q8_0 below 1024 columns, else agq4)."
        ),
    ] = "auto",
    target_bpw: Annotated[
        float,
        typer.Option(
            min=0, help="Maximum bits per weight of the whole model; sensitive tensors get more bits. 0: no target."
        ),
    ] = 0.0,
    target_types: Annotated[
        str,
        typer.Option(
            help=f"Types beside AGQ4 that --target-bpw may give, of {', '.join(LARGER_TYPES)} (default: all). "
            "q8_0 alone is faster, but loses more.",
            show_default=False,
        ),
    ] = "",
    act_bits: Annotated[int, typer.Option("--act-bits", help="Activation bits: 8, or 4 (far less accurate).")] = 8,
    act_scale: Annotated[
        str,
        typer.Option(
            help="Which activations share a scale: token (all channels), group (64 channels) or rotated (64 channels, "
            "rotated before rounding)."
        ),
    ] = "rotated",
    keep_norms: Annotated[
        bool,
        typer.Option("--keep-norms", help="Do not change the norms, so that LoRA adapters for the source still fit."),
    ] = False,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            "--calibration-tokens",
            min=64,
            help="Maximum number of calibration tokens. Default: 32768, up to 98304 for models of less than 0.6 "
            "billion weights unless --quality is best.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune/--no-tune", help="With quality best, train norms and scales last; this is the slowest step."
        ),
    ] = True,
    threads: Threads = 0,
    device: Annotated[
        Device,
        typer.Option(help="Where PyTorch runs the model for --quality best and --target-bpw."),
    ] = Device.cpu,
    memory: Annotated[
        int, typer.Option(parser=parse_size, metavar="SIZE", help="Memory for calibration, such as 4G.")
    ] = "4G",  # type: ignore[assignment]  # typer parses defaults, too
    split_size: Annotated[
        int | None,
        typer.Option(
            "--split-max-size",
            parser=parse_size,
            metavar="SIZE",
            help="Write several files of at most this size, such as 8G; each holds at least one tensor.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished parts beside OUT and continue from them next time.")
    ] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a model that is quantized already; this loses quality.")
    ] = False,
    keep_types: Annotated[
        str,
        typer.Option(
            help="Types of a quantized model whose tensors stay as they are, such as mxfp4,q6_K; none: no type."
        ),
    ] = "mxfp4",
    converter: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's convert_hf_to_gguf.py or its folder, for checkpoints that import-hf does not know.",
            show_default=False,
        ),
    ] = None,
    keep_float: Annotated[
        Path | None, typer.Option(help="Keep the float GGUF of a checkpoint folder in this file.", show_default=False)
    ] = None,
    prune: Annotated[
        str,
        typer.Option(
            help="Drop tokens of long prompts: 'answers' saves as much as keeps 95% of the right answers, a number "
            "such as 0.3 saves that share of the work.",
        ),
    ] = "0",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model to AGQ4.

    Without --calibration and --imatrix, the calibration text in the package is used. With several texts each gets an
    equal share of the tokens. An existing OUT is replaced only when the new file is complete.
    """
    try:
        from agq_gguf.quantization import pipeline
        from agq_gguf.quantization.estimate import estimate
        from agq_gguf.quantization.presets import with_preset
    except ImportError as e:
        raise missing_package("quantizing", e, "convert") from e
    options = QuantizeOptions(
        quality=quality.value,
        resume=resume,
        output_type=output_type,
        embedding_type=embedding_type,
        target_bpw=target_bpw,
        target_types=tuple(name.strip() for name in target_types.split(",") if target_types),
        threads=threads,
        device=device.value,
        memory=memory,
        calibration_tokens=calibration_tokens or 0,
        tune=tune,
        split_size=split_size or 0,
        allow_requantize=allow_requantize,
        converter=str(converter or ""),
        keep_float=str(keep_float or ""),
        keep_types=() if keep_types == "none" else tuple(keep_types.split(",")),
        matrix=replace(activation_options(act_bits, act_scale), equalize=not keep_norms),
    )
    options = with_preset(options, preset.value)
    text = _chosen_text(calibration or ([] if imatrix is None else ["none"]))
    if imatrix is not None and text is not None:
        show.complain(f"note: {imatrix} is not used, because a text is given; leave out --calibration to use it")
    share = _share_to_save(prune)
    if share != 0 and calibration == ["none"]:
        raise InputError("--prune needs a text; leave out --calibration none")
    if share != 0 and split_size:
        raise InputError("--prune does not support several files; leave out --split-max-size")
    if dry_run:
        plans = pipeline.plan_file(source, options, calibration=text, imatrix=imatrix)
        warnings = pipeline.plan_warnings(source, options)
        if warnings:
            options = replace(options, quality="balanced")
        needed = estimate(plans, options, calibrated=text is not None, threads=threads or default_threads())
        if as_json:
            write_plan(plans, needed, options.quality, warnings)
            return
        show_plan(plans, needed)
        for warning in warnings:
            show.complain(f"warning: {warning}")
        return
    with show.ProgressView(quiet=quiet or as_json) as view:
        report = pipeline.quantize(
            source, target, calibration=text, imatrix=imatrix, options=options, progress=view.update
        )
        wanted = text or default_calibration()
        pruned = None if share == 0 else prune_new(target, share, wanted, threads, view)
    if as_json:
        show.write_json({**asdict(report), "pruning": asdict(pruned) if pruned else None})
        return
    show_report(report, source)
    if pruned is not None:
        show_calibration(pruned)


def _share_to_save(prune: str) -> float | None:
    """The share of the work that --prune asks for; None: as much as keeps the answers."""
    if prune == "answers":
        return None
    try:
        share = float(prune)
    except ValueError:
        share = -1
    if not 0 <= share <= 0.9:
        raise typer.BadParameter(f"expected 'answers' or a share of 0 to 0.9, got {prune!r}", param_hint="--prune")
    return share


def _chosen_text(names: list[str]) -> LoadedText | None:
    """The text that the values of --calibration name; None for `none`."""
    if not names:
        return default_calibration()
    if "none" in names:
        if len(names) > 1:
            raise InputError("--calibration none leaves calibration out; it cannot be combined with a text")
        return None
    return mix_texts(*(default_calibration() if name == "default" else name for name in names))


def show_plan(plans: list[TensorPlan], needed: Estimate) -> None:
    """Prints the type that each tensor would get, and what the run would need."""
    from agq_gguf.gguf_io.writer import layout

    placed = layout((plan.source.name, plan.type_name, plan.source.shape) for plan in plans)
    total = sum(target.n_bytes for target in placed)
    rows = []
    for plan, target in zip(plans, placed, strict=True):
        shape = " x ".join(map(str, plan.source.shape))
        why = "keeps its own 4-bit codes" if plan.own_codes else plan.reason
        rows.append([plan.source.name, shape, plan.source.type_name, plan.type_name, show.size(target.n_bytes), why])
    show.table(["tensor", "shape", "from", "to", ">size", "reason"], rows)
    elements = sum(plan.source.n_elements for plan in plans)
    show.say(f"{show.size(total)}, {8 * total / elements:.2f} bits per weight; nothing was written")
    show.say(
        f"the run would need about {show.duration(needed.seconds)}, {show.size(needed.memory_bytes)} of memory and "
        f"{show.size(needed.disk_bytes)} of disk"
    )


def write_plan(plans: list[TensorPlan], needed: Estimate, quality: str, warnings: list[str]) -> None:
    """Writes the same as JSON; `quality` is what the run would use, and `warnings` say why if it was not asked for."""
    from agq_gguf.gguf_io.writer import layout

    placed = layout((plan.source.name, plan.type_name, plan.source.shape) for plan in plans)
    tensors = [
        {
            "name": plan.source.name, "shape": plan.source.shape, "source_type": plan.source.type_name,
            "type_name": plan.type_name, "n_bytes": target.n_bytes, "reason": plan.reason,
            "own_codes": plan.own_codes,
        }
        for plan, target in zip(plans, placed, strict=True)
    ]  # fmt: skip
    elements = sum(plan.source.n_elements for plan in plans)
    bits = 8 * needed.disk_bytes / elements
    show.write_json(
        {"tensors": tensors, "bits_per_weight": bits, **asdict(needed), "quality": quality, "warnings": warnings}
    )


def show_report(report: Report, source: Path) -> None:
    """Prints the types and errors of the tensors, and why some are not AGQ4."""
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
        show.table(["output error", ">lowest", ">median", ">highest", "highest in"], rows)
    for tensor in report.tensors:
        if tensor.note:
            show.complain(f"note: {tensor.name}: {tensor.note}")
    for warning in report.warnings:
        show.complain(f"warning: {warning}")
    show.say(f"calibration: {report.guidance}")
    files = f" in {len(report.paths)} files" if len(report.paths) > 1 else ""
    show.say(
        f"{source.name} {show.size(report.source_bytes)} -> {report.paths[0]} {show.size(report.n_bytes)}{files}, "
        f"{report.bits_per_weight:.2f} bits per weight"
        + (f"; with --preset small: {show.size(report.small_bytes)}" if report.small_bytes else "")
    )
    if _may_generate(report.paths[0]):
        show.say(f'Try it: agq-gguf generate {shlex.quote(str(report.paths[0]))} -p "Once upon a time"')


def _may_generate(path: Path) -> bool:
    """Whether a model is for text and predicts a next token here, as far as that is known without its weights."""
    try:
        with Model(path, vocab_only=True) as model:
            return not (declared_problem(model) or model.facts.embeds)
    except AgqError:  # no llama-cpp-python, or one that does not know this architecture
        return False


def _by_kind(worst: list[TensorReport]) -> dict[str, tuple[list[float], str]]:
    """Kind of tensor -> its errors and the name of the worst tensor; `worst` has the largest error first."""
    found: dict[str, tuple[list[float], str]] = {}
    for tensor in worst:
        kind = kind_of(tensor.name)
        found.setdefault(kind, ([], tensor.name))[0].append(tensor.error or 0.0)
    return found


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
