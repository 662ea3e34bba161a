"""The command `calibrate-pruning`, and the display of prompts with dropped tokens."""

from __future__ import annotations

import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Json, Quiet, Threads
from agq_gguf.errors import AgqError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from agq_gguf.pruning.file import PruningInfo
    from agq_gguf.pruning.report import Kept, PruneReport
    from agq_gguf.runtime.model import Model
    from agq_gguf.runtime.text import TextModel
    from agq_gguf.text import LoadedText

# One colour for each pruning layer, the earliest first; further layers share the last colour.
_COLOURS = ("red", "dark_orange", "yellow", "green", "cyan", "blue")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"expected layer numbers such as 3,7, got {text!r}") from None


def calibrate_pruning(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="AGQ4 model.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: MODEL itself.", show_default=False)
    ] = None,
    answers: Annotated[
        float, typer.Option(min=0.01, max=1, help="Part of the model's right answers that must stay right.")
    ] = 0.95,
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap",
            help="Let the words of the question count, too: saves more, but fails more often if a question uses other "
            "words than the text.",
        ),
    ] = False,
    share: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Save this share of a long prompt's work instead, whatever it costs; 0: never drop tokens.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text file similar to what the model will read; default: the text in the package.", show_default=False
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="With --share: how to measure the importance of a token: recent, received, first or learned; "
            "default: the better of recent and learned.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=255,
            help="Always keep the last N tokens; default: 64, or 32 for the score learned.",
            show_default=False,
        ),
    ] = None,
    reach: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=15,
            help="Each token gets the highest importance within N places; default: 2, or 0 for the score learned.",
            show_default=False,
        ),
    ] = None,
    reuse: Annotated[
        bool | None,
        typer.Option(
            "--reuse/--no-reuse",
            help="Let later layers still attend to dropped tokens, as they were when dropped; default: chosen by "
            "calibration.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Pruning layers, such as 3,7; default: chosen by calibration.", show_default=False),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(min=2, help="Number of calibration prompts; default: 96, or 16 with --share.", show_default=False),
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose which tokens of long prompts a model drops.

    Dropping tokens after some layers saves a share of the work. Calibration plants facts in the text, asks the model
    for them, and saves as much as keeps its right answers. With --share it saves that share instead, at the layers and
    thresholds that change the model's predictions least. The weights do not change.
    """
    from agq_gguf.calibration.default_text import default_calibration
    from agq_gguf.pruning.calibrate import calibrate_pruning as run
    from agq_gguf.pruning.options import PruneOptions

    choice = PruneOptions(
        share=share,
        answers=answers,
        overlap=overlap,
        score=score,
        keep=keep,
        reach=reach,
        reuse=reuse,
        layers=_layers(layers) if layers else None,
        prompts=prompts,
        threads=threads,
    )
    text = calibration or default_calibration()
    with show.ProgressView(quiet=quiet or as_json) as view:
        report = run(model, output or model, calibration=text, choice=choice, progress=view.update)
    if as_json:
        show.write_json(asdict(report) if report else None)
    elif report is None:
        show.say(f"{output or model}: drops no tokens")
    else:
        show_calibration(report)
        show.say(f"{output or model}: written")


def prune_new(
    model: Path, share: float | None, calibration: LoadedText, threads: int, view: show.ProgressView
) -> PruneReport | None:
    """Calibrates a model that was just made, in place; if that fails the model does not change.

    `share` is the share of the work to save; None: as much as keeps the answers.
    """
    from agq_gguf.pruning.calibrate import calibrate_pruning as run
    from agq_gguf.pruning.options import PruneOptions

    try:
        choice = PruneOptions(share=share, threads=threads)
        return run(model, model, calibration=calibration, choice=choice, progress=view.update)
    except AgqError as e:
        raise type(e)(f"{model} is complete, but drops no tokens: {e}") from e


def show_calibration(report: PruneReport) -> None:
    """Prints the curve of savings, and the setting that was chosen."""
    chosen = report.chosen
    rows = [
        _row(point.saving, point.kl, point.nll, report.nll, point.plan.spec(), point is chosen)
        for point in report.curve
    ]
    show.table(_COLUMNS, rows)
    show.say(f"measured on {report.origin}; unpruned NLL {report.nll:.4f}; * marks the setting in the file")
    if report.kept is not None:
        show_kept(report.kept)


def show_kept(kept: Kept) -> None:
    """Prints how many right answers to questions about planted facts stayed right."""
    rows = [
        [kind, str(asked), str(unpruned), str(right)]
        for kind, asked, unpruned, right in zip(kept.kinds, kept.asked, kept.unpruned, kept.right, strict=True)
    ]
    show.table(["question", ">asked", ">right unpruned", ">of these right"], rows)
    low, high = kept.interval()
    show.say(
        f"{kept.share:.0%} of the right answers stay right (95% interval {low:.0%} to {high:.0%}; promised "
        f"{kept.promised:.0%}); {kept.saving:.0%} of the work saved, these prompts are read {kept.speed:.2f} times as "
        "fast"
    )


_COLUMNS = ["", ">work saved", ">KL", ">NLL", ">NLL change", "setting (AGQ_PRUNE)"]


def _row(saving: float, kl: float, nll: float, unpruned: float, spec: str, chosen: bool) -> list[str]:
    change = f"{nll / unpruned - 1:+.2%}" if unpruned else ""
    return ["*" if chosen else "", f"{saving:.1%}", f"{kl:.5f}", f"{nll:.4f}", change, spec]


def show_pruning(info: PruningInfo) -> None:
    """Prints what a file says about its pruning."""
    rows = [_row(p.saving, p.kl, p.nll, info.nll, p.spec, abs(p.saving - info.saving) < 1e-6) for p in info.curve]
    show.table(_COLUMNS, rows)
    show.say(f"pruning calibrated on {info.calibration}; unpruned NLL {info.nll:.4f}; * marks the setting in the file")
    if info.kept is not None:
        show_kept(info.kept)


def pruning(spec: str | None) -> AbstractContextManager[None]:
    """A block in which opened models prune as `spec` says; None: as their file says."""
    if spec is None:
        return nullcontext()
    from agq_gguf.runtime.plugin import options

    return options(prune=spec)


def check_layers(spec: str, model: Model) -> None:
    """Raises InputError for pruning layers that the model does not have, or that no other layer follows."""
    for layer in map(int, re.findall(r"(?:^|,)(\d+):", spec.partition(";")[0].replace(" ", ""))):
        if layer >= model.n_layer - 1:
            raise InputError(
                f"{model.path}: layer {layer} cannot be a pruning layer, because other layers must follow; the model "
                f"has the layers 0 to {model.n_layer - 1}"
            )


def why_all_kept(text: TextModel, spec: str | None, n_tokens: int) -> str:
    """Why no token was dropped of a prompt that was just read; empty if some were, or if nobody asked for that."""
    from agq_gguf.pruning.plan import MIN_PROMPT
    from agq_gguf.runtime.log import why_not_pruned
    from agq_gguf.runtime.plugin import last_pruned

    if spec is None or spec.partition(";")[0].strip() == "off":
        return ""
    if text.model.is_recurrent:
        return "recurrent and hybrid models are not pruned"
    if any(layer >= 0 for layer in last_pruned()):
        return ""
    shortest = re.search(r";min=(\d+)", spec.replace(" ", ""))
    least = int(shortest[1]) if shortest else MIN_PROMPT
    if n_tokens < least:
        return f"it has {n_tokens} tokens, and fewer than {least} are not pruned"
    return why_not_pruned() or "the setting asks for none"


def show_dropped(text: TextModel, model: Path, spec: str | None, tokens: NDArray[np.int32]) -> None:
    """Reads a prompt and shows which of its tokens were dropped, or why none was."""
    from agq_gguf.gguf_io.shards import open_model
    from agq_gguf.pruning.plan import work_of
    from agq_gguf.runtime.pruned import pieces_of

    with open_model(model) as reader:
        work = work_of({name: tensor.n_elements for name, tensor in reader.tensors.items()})
    text.read(tokens)
    pieces, left = pieces_of(tokens.tolist(), text.detokenize)
    hidden = (os.environ.get("AGQ_PRUNE", "") if spec is None else spec).lstrip().startswith("mask")
    show_prompt(pieces, None if hidden else work.saving([left]), why_all_kept(text, spec, len(tokens)))


def show_prompt(pieces: list[tuple[str, int]], saving: float | None, why: str = "") -> None:
    """Prints a prompt, given as pieces of text with the layer that dropped each (-1: kept), and the work saved.

    `saving` is None if the tokens were only hidden, and `why` says why none was dropped.
    """
    out = show.console()
    layers = sorted({layer for _, layer in pieces if layer >= 0})
    text = Text()
    for piece, layer in pieces:
        clean = show.safe(piece)
        if layer < 0:
            text.append(clean)
        elif out.is_terminal:
            text.append(clean, style=f"{_COLOURS[min(layers.index(layer), len(_COLOURS) - 1)]} strike")
            text.append(str(layer).translate(_SUBSCRIPTS) if _can_subscript() else f"({layer})", style="dim")
        else:
            text.append(f"{{{layer}:{clean}}}")
    out.print(text, soft_wrap=True)
    if layers and saving is None:
        show.complain("each hidden token is marked with the layer after which it was hidden; mask saves no work")
    elif layers:
        show.complain(
            f"each dropped token is marked with the layer after which it was dropped; {saving:.0%} of the work saved"
        )
    else:
        show.complain(f"no token of this prompt was dropped{f': {why}' if why else ''}")


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _can_subscript() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
