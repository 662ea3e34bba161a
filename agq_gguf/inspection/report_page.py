"""Makes the page of `agq-gguf report`: one self-contained HTML file with plotly figures, for light and dark themes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.colors import qualitative
from plotly.offline import get_plotlyjs

from agq_gguf.inspection.report import InputRange, ReportData, SamplePrompt

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_CHANNEL_BINS = 384  # columns of a picture; wider inputs are binned, and each bin shows its largest channel
_POWERS = {"exponentformat": "power"}  # write 10^-4, not 100 with the prefix for micro
_ERROR_BARS = {"color": "#999"}  # visible on light and dark backgrounds


@dataclass(frozen=True)
class Figure:
    """A picture with a title, an explanation, and its data as plotly's JSON."""

    title: str
    text: str
    json: str


def render(data: ReportData) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = _size
    environment.filters["file_name"] = lambda path: Path(path).name  # folder names are private
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        data=data,
        figures=_figures(data),
        refined=any(tensor.agq and tensor.agq.exponent_max for tensor in data.model.tensors),
        plotly=get_plotlyjs(),
        name=data.model.name or Path(data.model.path).name,
        file=Path(data.model.path).name,
    )


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def _figures(data: ReportData) -> list[Figure]:
    figures = [_bytes(data)]
    layered = [one for one in data.ranges if one.layer >= 0]
    if layered:
        figures += [_ranges(layered), _channels(layered, data.text)]
        if any(one.exponents.any() for one in layered):
            figures.append(_exponents(layered))
    if data.prompt is not None and data.prompt.first_attention:
        figures.append(_first_attention(data.prompt))
    if data.errors:
        figures.append(_errors(data.errors))
    if any(entry["prompt"] or entry["generation"] for entry in data.measured.bench):
        figures.append(_speed(data.measured.bench))
    if data.measured.evaluations:
        figures.append(_quality(data.measured.evaluations))
    return figures


def _figure(title: str, text: str, traces: Sequence[Any], **layout: Any) -> Figure:
    picture = go.Figure(traces)
    picture.update_layout(
        template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", height=layout.pop("height", 380),
        margin={"l": 70, "r": 20, "t": 30, "b": 60}, legend={"orientation": "h", "y": 1.12}, **layout,
    )  # fmt: skip
    return Figure(title, text, str(picture.to_json()))


def _bytes(data: ReportData) -> Figure:
    types = data.model.types
    bars = go.Bar(
        x=list(types), y=[info.bytes / 2**20 for info in types.values()],
        text=[f"{info.tensors} tensors, {info.bits_per_weight:.2f} bits" for info in types.values()],
    )  # fmt: skip
    return _figure("Bytes by tensor type", "", [bars], yaxis={"title": "MiB"}, height=300)


def _by_kind(ranges: list[InputRange]) -> dict[str, list[InputRange]]:
    kinds: dict[str, list[InputRange]] = defaultdict(list)
    for one in ranges:
        kinds[one.kind].append(one)
    return {kind: sorted(group, key=lambda one: one.layer) for kind, group in kinds.items()}


def _label(one: InputRange) -> str:
    """The weights that share an input, without the layer."""
    return ", ".join(name.split(".", 2)[-1].removesuffix(".weight") for name in one.weights)


def _ranges(ranges: list[InputRange]) -> Figure:
    traces = []
    for group, colour in zip(_by_kind(ranges).values(), cycle(qualitative.Plotly)):
        layers = [one.layer for one in group]
        label = f"input of {_label(group[0])}"
        largest = [float(one.abs_max.max()) for one in group]
        median = [float(np.median(one.abs_max)) for one in group]
        dotted = {"dash": "dot", "color": colour}
        traces.append(go.Scatter(x=layers, y=largest, name=label, line={"color": colour}))
        traces.append(go.Scatter(x=layers, y=median, name=f"{label}, median", line=dotted, showlegend=False))
    text = (
        "Largest absolute activation of each input (line), and the same for its median channel (dots). If all channels "
        "of a token share a scale, the distance between the two shows how much outlier channels enlarge that scale."
    )
    axes = {"xaxis": {"title": "layer", "dtick": 1 if len(ranges) < 120 else None}}
    return _figure("Activation range by layer", text, traces, yaxis={"title": "|x|", "type": "log"}, **axes)


def _calmness(group: list[InputRange]) -> float:
    """Sort key for menus: inputs with large outliers come first."""
    return -sum(float(one.abs_max.max() / max(np.median(one.abs_max), 1e-30)) for one in group) / len(group)


def _binned(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """At most `_CHANNEL_BINS` values, each the maximum of its bin."""
    bins = min(len(values), _CHANNEL_BINS)
    edges = np.linspace(0, len(values), bins, endpoint=False).astype(np.int64)
    found: NDArray[np.float32] = np.maximum.reduceat(values, edges)
    return found


def _pages(kinds: dict[str, Any], traces: list[Any]) -> list[dict[str, Any]]:
    """A menu that shows one trace at a time."""
    buttons = [
        {"label": label, "method": "update", "args": [{"visible": [j == i for j in range(len(traces))]}]}
        for i, label in enumerate(kinds)
    ]
    return [{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.18, "yanchor": "top"}]


def _channels(ranges: list[InputRange], text: str) -> Figure:
    kinds = {f"input of {_label(group[0])}": group for group in sorted(_by_kind(ranges).values(), key=_calmness)}
    traces = []
    for i, group in enumerate(kinds.values()):
        columns = len(group[0].abs_max)
        z = np.log2(np.maximum([_binned(one.abs_max) for one in group], 2.0**-20))
        x = np.linspace(0, columns, z.shape[1], endpoint=False).astype(np.int64)
        traces.append(
            go.Heatmap(
                z=z.round(2).tolist(), x=x.tolist(), y=[one.layer for one in group], visible=i == 0,
                colorscale="Viridis", colorbar={"title": "log2 |x|"},
                hovertemplate="layer %{y}, channel %{x}: 2^%{z}<extra></extra>",
            )
        )  # fmt: skip
    explained = f"Largest absolute value of each channel on {text}, as a power of two; vertical lines are outliers."
    return _figure(
        "Channels", explained, traces, updatemenus=_pages(kinds, traces), xaxis={"title": "channel"},
        yaxis={"title": "layer"},
    )  # fmt: skip


def _exponents(ranges: list[InputRange]) -> Figure:
    kinds = {f"input of {_label(group[0])}": group for group in sorted(_by_kind(ranges).values(), key=_calmness)}
    traces = []
    for i, group in enumerate(kinds.values()):
        outliers = [
            [", ".join(map(str, one.order[64 * g : 64 * g + 64][:6])) for g in range(len(one.exponents))]
            for one in group
        ]
        traces.append(
            go.Heatmap(
                z=[one.exponents.tolist() for one in group], y=[one.layer for one in group], visible=i == 0, zmin=0,
                zmax=max(1, max(int(one.exponents.max()) for one in group)), colorscale="Cividis", customdata=outliers,
                colorbar={"title": "e", "dtick": 1},
                hovertemplate="layer %{y}, group %{x}: e = %{z}<br>channels %{customdata}, ...<extra></extra>",
            )
        )  # fmt: skip
    text = (
        "Refinement exponent e of each group of 64 stored columns. Activations in the group are divided by 2^e before "
        "they share the token's scale, and the weights are multiplied by it; this costs no time. Point at a group to "
        "see its first channels."
    )
    return _figure(
        "Outlier groups and their exponents", text, traces, updatemenus=_pages(kinds, traces),
        xaxis={"title": "group of 64 columns"}, yaxis={"title": "layer"},
    )  # fmt: skip


def _first_attention(prompt: SamplePrompt) -> Figure:
    traces = [
        go.Scatter(
            x=list(range(len(values))), y=[None if np.isnan(v) else float(v) for v in values], name=f"layer {layer}"
        )
        for layer, values in prompt.first_attention.items()
    ]
    text = (
        "Share of attention that each token of the sample prompt pays to the first token (mean of all heads), at the "
        "layers after which this model drops tokens. This is the importance of the Agile-Quant paper. Gaps are tokens "
        "that are never dropped."
    )
    axes = {"xaxis": {"title": "token"}, "yaxis": {"title": "attention", "type": "log", **_POWERS}}
    return _figure("Attention paid to the first token", text, traces, **axes)


def _errors(errors: dict[str, float]) -> Figure:
    kinds: dict[str, list[tuple[int, float, str]]] = defaultdict(list)
    for i, (name, value) in enumerate(errors.items()):
        parts = name.removesuffix(".weight").split(".", 2)
        layer = int(parts[1]) if parts[0] == "blk" and len(parts) == 3 and parts[1].isdigit() else i
        kinds[parts[-1]].append((layer, value, name))
    traces = [
        go.Scatter(
            x=[layer for layer, _, _ in points], y=[value for _, value, _ in points], name=kind, mode="lines+markers",
            text=[name for _, _, name in points], hovertemplate="%{text}: %{y:.2e}<extra></extra>",
        )
        for kind, points in kinds.items()
    ]  # fmt: skip
    text = (
        "Squared error of the output divided by the squared output, on the calibration data, as quantize measured it."
    )
    axis = {"title": "relative error", "type": "log", **_POWERS}
    return _figure("Error of each tensor", text, traces, xaxis={"title": "layer"}, yaxis=axis)


def _speed(entries: list[dict[str, Any]]) -> Figure:
    names = [Path(entry["model"]).name for entry in entries]
    traces = []
    for part in ("prompt", "generation"):
        speeds = [entry[part] for entry in entries]
        if not any(speeds):
            continue
        median = [speed["median"] if speed else None for speed in speeds]
        low, high = ([speed["quartiles"][i] if speed else None for speed in speeds] for i in (0, 1))
        up = [h - m if m is not None else None for h, m in zip(high, median, strict=True)]
        down = [m - v if m is not None else None for v, m in zip(low, median, strict=True)]
        tokens = next(speed["tokens"] for speed in speeds if speed)
        bars = {"type": "data", "array": up, "arrayminus": down, "symmetric": False, **_ERROR_BARS}
        traces.append(go.Bar(x=names, y=median, name=f"{part} of {tokens} tokens", error_y=bars))
    text = "Medians, with lines between the quartiles. The models alternated in one run."
    return _figure("Speed", text, traces, yaxis={"title": "tokens/s"}, barmode="group")


def _quality(entries: list[dict[str, Any]]) -> Figure:
    names = [Path(entry["model"]).name for entry in entries]
    bars = go.Bar(
        x=names, y=[entry["mean_kl"] for entry in entries],
        error_y={"type": "data", "array": [entry.get("mean_kl_error", 0) for entry in entries], **_ERROR_BARS},
        text=[f"perplexity {entry['perplexity']:.4f}" for entry in entries],
        textposition="inside", insidetextanchor="start",  # away from the error line
    )  # fmt: skip
    text = "Mean KL divergence from the reference, in nats per token; the lines are standard errors. Lower is better."
    return _figure("Quality", text, [bars], yaxis={"title": "KL divergence", **_POWERS})
