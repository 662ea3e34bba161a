"""Draws the results of `bench` and `evaluate` into picture files (PNG, SVG or PDF, by the file's name)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agq_gguf.errors import InputError, OutputError, missing_package

if TYPE_CHECKING:
    from agq_gguf.measure.bench import Result
    from agq_gguf.measure.evaluate import Evaluation


def check_kind(path: Path) -> None:
    """Raises HostError without matplotlib, InputError if it cannot draw the kind of picture that the name asks for."""
    _pyplot()
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(f"{path}: the name of a picture must end in one of {', '.join(sorted(known))}")


def plot_bench(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Draws bars of tokens/s with quartiles, one panel for prompt and one for generation. Raises OutputError."""
    parts = [part for part in ("prompt", "generation") if any(getattr(result, part) for result in results)]
    if not parts:
        raise InputError("nothing was measured, so there is nothing to draw")
    figure, axes = panels(len(parts), len(results))
    names = [Path(result.model).name for result in results]
    for axis, part in zip(axes, parts, strict=True):
        speeds = [getattr(result, part) for result in results]
        medians = [speed.median for speed in speeds]
        below = [speed.median - speed.quartiles[0] for speed in speeds]
        above = [speed.quartiles[1] - speed.median for speed in speeds]
        bars = axis.barh(names, medians, xerr=[below, above], color="tab:blue", ecolor="black", capsize=3)
        axis.bar_label(bars, [f" {speed.median:.1f} ({speed.ratio:.2f})" for speed in speeds], padding=4)
        axis.set_title(f"{part} of {speeds[0].tokens} tokens (ratio to {Path(results[0].model).name})")
        axis.set_xlabel("tokens/s")
        axis.margins(x=0.25)
        axis.invert_yaxis()
    save(figure, path)


def plot_evaluation(found: Evaluation, name: str, path: str | os.PathLike[str]) -> None:
    """Draws how the KL divergence from the reference is distributed over the positions. Raises OutputError."""
    figure, (axis,) = panels(1, 6)
    smallest = max(found.kl_percentiles[1], 1e-9)  # the axis is logarithmic
    axis.plot(range(len(found.kl_percentiles)), [max(value, smallest) for value in found.kl_percentiles])
    for label, value in {"mean": found.mean_kl, "99.9%": found.kl_999}.items():
        axis.axhline(max(value, smallest), color="black", linewidth=0.8, linestyle="--")
        axis.annotate(f"{label} {value:.2e}", (0, max(value, smallest)), xytext=(4, 4), textcoords="offset points")
    axis.set_yscale("log")
    axis.set_title(
        f"{name}: perplexity {found.perplexity:.4f}, reference {found.reference_perplexity:.4f}, "
        f"same most likely token {found.top1_agreement:.1%}"
    )
    axis.set_xlabel("share of positions with at most this divergence, percent")
    axis.set_ylabel("KL divergence, nats per token")
    save(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise missing_package("drawing pictures", e, "plot") from e
    return matplotlib


def panels(n: int, rows: int) -> tuple[Any, Any]:
    """A figure without a window, and its `n` axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, n * (1.4 + 0.4 * rows)), layout="constrained")
    return figure, figure.subplots(n, 1, squeeze=False)[:, 0]


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure. Raises OutputError."""
    try:
        figure.savefig(path, dpi=144)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror}") from e
