"""The command `calibrate-pruning`, and how prompts with dropped tokens are shown."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from agq_gguf.cli import output as show
from agq_gguf.cli.options import Json, Quiet, Threads
from agq_gguf.errors import AgqError

if TYPE_CHECKING:
    from agq_gguf.inspection.inspect import PruningInfo
    from agq_gguf.pruning.calibrate import PruneReport
    from agq_gguf.text import LoadedText

# What left early is the reddest; layers beyond the list share its last colour.
_COLOURS = ("red", "dark_orange", "yellow", "green", "cyan", "blue")


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: wanted layers, such as 3,7") from None


def calibrate_pruning(
    model: Annotated[Path, typer.Argument(help="AGQ4 model.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; none: MODEL itself.", show_default=False)
    ] = None,
    share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of a long prompt's work to save; 0: never drop tokens.")
    ] = 0.3,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file, ideally like what the model will read.", show_default=False)
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="What makes a token important: recent, received, first or learned; none: the better of recent and "
            "learned.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=255,
            help="So many tokens at the end always stay; none: 64, or 32 if learned.",
            show_default=False,
        ),
    ] = None,
    reach: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=15,
            help="Neighbours so far from an important token stay; none: 2, or 0 if learned.",
            show_default=False,
        ),
    ] = None,
    reuse: Annotated[
        bool | None,
        typer.Option(
            "--reuse/--no-reuse",
            help="Later layers can still look at dropped tokens as they were; none: chosen on the text.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Pruning layers, such as 3,7; none: chosen on the text.", show_default=False)
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to try on.")] = 16,
    threads: Threads = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose which tokens of long prompts a model drops on their way, so that a share of the work is saved.

    Layers and thresholds are those that change the text behind the prompts least. The weights stay as they are.
    """
    from agq_gguf.pruning.calibrate import calibrate_pruning as run
    from agq_gguf.pruning.options import PruneOptions

    choice = PruneOptions(
        share=share,
        score=score,
        keep=keep,
        reach=reach,
        reuse=reuse,
        layers=_layers(layers) if layers else None,
        prompts=prompts,
        threads=threads,
    )
    with show.ProgressView(quiet=quiet or as_json) as view:
        report = run(model, output or model, calibration=calibration, choice=choice, progress=view.update)
    if as_json:
        show.write_json(asdict(report) if report else None)
    elif report is None:
        show.say(f"{output or model}: drops no tokens")
    else:
        show_calibration(report)
        show.say(f"{output or model}: written")


def prune_new(
    model: Path, share: float, calibration: LoadedText | None, threads: int, view: show.ProgressView
) -> PruneReport | None:
    """Calibrates a model that was just made, in place; if that fails the model stays as it is."""
    from agq_gguf.pruning.calibrate import calibrate_pruning as run
    from agq_gguf.pruning.options import PruneOptions

    try:
        choice = PruneOptions(share=share, threads=threads)
        return run(model, model, calibration=calibration, choice=choice, progress=view.update)
    except AgqError as e:
        raise type(e)(f"{model} is complete, but drops no tokens: {e}") from e


def show_calibration(report: PruneReport) -> None:
    """The curve, and what was chosen."""
    chosen = report.chosen
    rows = [
        _row(point.saving, point.kl, point.nll, report.nll, point.plan.spec(), point is chosen)
        for point in report.curve
    ]
    show.table(_COLUMNS, rows)
    show.say(f"measured on {report.origin}; unpruned NLL {report.nll:.4f}; * is what the file does")


_COLUMNS = ["", ">work saved", ">KL", ">NLL", ">change", "setting (AGQ_PRUNE)"]


def _row(saving: float, kl: float, nll: float, unpruned: float, spec: str, chosen: bool) -> list[str]:
    change = f"{nll / unpruned - 1:+.2%}" if unpruned else ""
    return ["*" if chosen else "", f"{saving:.1%}", f"{kl:.5f}", f"{nll:.4f}", change, spec]


def show_pruning(info: PruningInfo) -> None:
    """What a file says about its pruning."""
    rows = [_row(p.saving, p.kl, p.nll, info.nll, p.spec, abs(p.saving - info.saving) < 1e-6) for p in info.curve]
    show.table(_COLUMNS, rows)
    show.say(f"pruning calibrated on {info.calibration}; unpruned NLL {info.nll:.4f}; * is what the file does")


def pruning(spec: str | None) -> AbstractContextManager[None]:
    """The block in which to open a model that is to prune as `spec` says; None: as its file does."""
    if spec is None:
        return nullcontext()
    from agq_gguf.runtime.plugin import options

    return options(prune=spec)


def read_prompt(llama: Any, model: Path, prompt: str) -> list[int]:
    """Reads a prompt, shows which of its tokens were dropped, and returns the tokens to go on from."""
    from agq_gguf.gguf_io.shards import open_model
    from agq_gguf.pruning.plan import work_of
    from agq_gguf.runtime.pruned import read_prompt as read

    with open_model(model) as reader:
        work = work_of({name: tensor.n_elements for name, tensor in reader.tensors.items()})
    tokens: list[int] = llama.tokenize(prompt.encode(), special=True)
    pieces, left = read(llama, tokens)
    show_prompt(pieces, work.saving([left]))
    return tokens


def show_prompt(pieces: list[tuple[str, int]], saving: float) -> None:
    """A prompt as pieces of text with the layer where each left, -1 if it stayed; and a line about the sum."""
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
    if layers:
        show.complain(
            f"dropped tokens are marked with the layer behind which they left; {saving:.0%} of the work saved"
        )
    else:
        show.complain("no token of this prompt was dropped")


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _can_subscript() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
