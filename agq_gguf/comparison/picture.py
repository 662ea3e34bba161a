"""A comparison as a picture: size against divergence, with the speed as the size of the mark."""

from __future__ import annotations

import os
from collections.abc import Sequence

from agq_gguf.errors import InputError
from agq_gguf.inspection.plots import panels, save
from agq_gguf.measure.row import Row

_LEAST_AREA, _MOST_AREA, _PLAIN_AREA = 30, 430, 60  # points squared


def plot_comparison(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draws the rows into a picture file (PNG, SVG or PDF). Raises InputError or OutputError."""
    shown = [row for row in rows if row.mean_kl > 0]
    if not shown:
        raise InputError("no file differs from its source, so there is nothing to draw")
    figure, (axis,) = panels(1, 12)
    fastest = max(row.prompt_speed or 0.0 for row in shown)
    for row in shown:
        speed = row.prompt_speed or 0.0
        area = _LEAST_AREA + (_MOST_AREA - _LEAST_AREA) * speed / fastest if fastest else _PLAIN_AREA
        place = (row.bits_per_weight, row.mean_kl)
        axis.scatter(*place, s=area, color="tab:blue" if row.ours else "tab:gray", alpha=0.7)
        label = f"{row.name}, {speed:.0f} t/s" if speed else row.name
        # Those of AGQ4 are mostly the lower ones, so below them there is room.
        offset, side = ((0, -24), "center") if row.ours else ((10, 6), "left")
        axis.annotate(label, place, xytext=offset, ha=side, textcoords="offset points")
    axis.set_yscale("log")
    axis.set_xlabel("bits per weight of the whole file")
    axis.set_ylabel("KL divergence, nats per token")
    marks = "; larger marks: faster prompts" if fastest else ""
    axis.set_title(f"Size against divergence of AGQ4 (blue) and llama.cpp's types (gray){marks}")
    axis.margins(x=0.2, y=0.15)
    save(figure, path)
