"""Draws the pictures of docs/how-it-works.md and README.md as SVG; readable on light and dark pages.

python docs/figures/make_figures.py
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
RESEARCH = HERE.parent / "research"
STYLE = (
    "<style>text{font:14px system-ui,sans-serif;fill:#333}.box{fill:#e8f0fe;stroke:#4a6fa5;stroke-width:1.5}"
    ".out{fill:#fde7d3;stroke:#c77d2e;stroke-width:1.5}.line{stroke:#777;stroke-width:1.5;fill:none;marker-end:url(#a)}"
    ".small{font-size:12px}.axis{stroke:#777;stroke-width:1.5;fill:none}</style>"
    '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L10 5L0 10z" fill="#777"/></marker></defs>'
)


def svg(width: int, height: int, parts: list[str]) -> str:
    """A picture on a white ground, so that it reads on any page."""
    ground = f'<rect width="{width}" height="{height}" fill="#fff" rx="6"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
    return head + STYLE + ground + "".join(parts) + "</svg>\n"


def box(x: int, y: int, w: int, h: int, lines: list[str], kind: str = "box") -> str:
    """A box with centred lines of text."""
    first = y + h / 2 + 5 - 9 * (len(lines) - 1)
    texts = "".join(
        f'<text x="{x + w / 2}" y="{first + 18 * i}" text-anchor="middle">{line}</text>' for i, line in enumerate(lines)
    )
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>{texts}'


def text(x: float, y: float, words: str, kind: str = "small") -> str:
    """A line of text that begins at x."""
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def arrow(path: str) -> str:
    """An arrow along an SVG path."""
    return f'<path class="line" d="{path}"/>'


def pipeline() -> str:
    """From a checkpoint to tokens."""
    return svg(820, 230, [
        box(10, 20, 120, 50, ["float GGUF", "+ text"]), arrow("M130 45H170"),
        box(170, 20, 140, 50, ["calibrate", "(in llama.cpp)"]), arrow("M310 45H350"),
        box(350, 20, 130, 50, ["refine: outliers", "into groups"]), arrow("M480 45H520"),
        box(520, 20, 140, 50, ["4-bit codes with", "error feedback"]), arrow("M660 45H700"),
        box(700, 20, 110, 50, ["AGQ4 GGUF"], "out"), arrow("M755 70V150H700"),
        box(520, 125, 180, 50, ["stock llama.cpp", "maps the file"]), arrow("M520 150H480"),
        box(300, 125, 180, 50, ["plugin: products,", "attention, pruning"], "out"), arrow("M300 150H260"),
        box(140, 125, 120, 50, ["tokens"]),
        text(10, 215, "Above: once, with Python. Below: at run time; nothing of llama.cpp is changed."),
    ])  # fmt: skip


def trip() -> str:
    """Channels before and after they are sorted into groups."""
    heights = [18, 25, 90, 14, 22, 12, 84, 20, 16, 24, 19, 13]
    order = sorted(range(12), key=lambda i: -heights[i])
    parts = [
        text(20, 20, "channels of a token, as they come"),
        text(430, 20, "sorted; the outliers' group divided by 4"),
    ]
    for at, channels, refined in ((20, range(12), False), (430, order, True)):
        for place, i in enumerate(channels):
            outlier, h = heights[i] > 50, heights[i]
            shown = h // 4 if refined and outlier else h
            x = at + 28 * place + (24 if refined and place > 1 else 0)
            kind = "out" if outlier else "box"
            parts.append(f'<rect class="{kind}" x="{x}" y="{130 - shown}" width="20" height="{shown}"/>')
    parts += [
        arrow("M370 90H415"),
        text(20, 150, "one 8-bit scale for all: most get few steps"),
        text(430, 150, "e = 2"), text(510, 150, "e = 0: all channels now use the scale well"),
    ]  # fmt: skip
    return svg(820, 165, parts)


def tile() -> str:
    """The bytes of one tile."""
    parts = [text(20, 20, "one tile: 16 rows x 128 columns, 1088 bytes = 17 cache lines, 4.25 bits per weight")]
    parts += [
        box(20, 35, 190, 44, ["32 + 16: scales of 12 bits"]), box(210, 35, 110, 44, ["16: attributes"], "out"),
        box(320, 35, 470, 44, ["1024: codes, 16 chunks of 64 bytes"]),
        arrow("M550 79V105"), box(320, 105, 470, 44, ["one chunk = 16 rows x 8 columns = two registers of 16 x 4"]),
        text(320, 170, "low nibbles: columns 0..3 of each row; high nibbles: columns 4..7."),
        text(320, 186, "Looked up in the codebook, it is what VPDPBUSD, VPMADDUBSW and SDOT take."),
        arrow("M265 79V105"), text(20, 125, "codebook, exponents, channel order, pruning:"),
        text(20, 141, "16 bytes of every tile, read as one stream"),
    ]  # fmt: skip
    return svg(820, 200, parts)


def rows(page: str, header: str) -> dict[str, list[str]]:
    """The rows of the first table of a research page whose header contains ``header``: first cell -> the others."""
    lines = iter((RESEARCH / page).read_text(encoding="utf-8").splitlines())
    if not any(line.startswith("|") and header in line for line in lines):
        raise ValueError(f"docs/research/{page} has no table with {header!r} in its header")
    next(lines)  # |---|
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        first, *others = (cell.strip(" *`") for cell in line.strip("|").split("|"))
        found[first.replace("`", "")] = others
    return found


def between(cell: str) -> tuple[float, float]:
    """The two ends of "4.53 to 4.56"; the same number twice if there is only one."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell.split("±")[0])]
    return numbers[0], numbers[-1]


def comparison() -> str:
    """Size against divergence, and speed, of stock types and AGQ4; the numbers come from docs/research."""
    return svg(960, 410, [*_divergence(), *_speed()])


def _divergence() -> list[str]:
    measured = rows("quality.md", "bits per weight of the file")
    parts = [
        text(20, 24, "Divergence from the float model against size", ""),
        '<path class="axis" d="M60 50V330H440"/>',
        text(66, 58, "KL divergence x 1000 (lower is better)"),
        text(190, 366, "bits per weight of the whole file"),
    ]
    parts += [text(30, 334 - 1.4 * tick, f"{tick}") for tick in (0, 50, 100, 150)]
    parts += [text(60 + (tick - 5) * 310 - 10, 348, f"{tick}") for tick in (5.0, 5.25, 5.5, 5.75, 6.0)]
    for name, (_, bits, divergence, _) in measured.items():
        x, (kl, _) = 60 + (float(bits) - 5) * 310, between(divergence.replace("*", ""))
        y, label = 330 - 1.4 * kl, f"{name}: {kl:g}"
        parts.append(f'<circle class="{"out" if "AGQ4" in name else "box"}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        left = x > 300  # no room to the right of it
        below = y > 270 and left
        where = (
            round(x - 6.6 * len(label) if left else x + 11, 1),
            round(y + 18 if below else y - 9 if left else y + 4, 1),
        )
        parts.append(text(*where, label))
    parts.append(text(20, 386, "SmolLM2-135M-Instruct, WikiText-2. Stock types: with an importance matrix of the"))
    parts.append(text(20, 402, "same text; their files fall back to larger types where 256 does not divide 576."))
    return parts


def _speed() -> list[str]:
    measured = rows("performance.md", "prompt of 512, tokens/s")
    parts = [
        text(530, 24, "Speed, tokens/s (higher is better)", ""),
        text(630, 50, "prompt of 512 tokens"), text(835, 50, "generation"),
    ]  # fmt: skip
    for i, name in enumerate(("AGQ4", "stock IQ4_XS", "stock Q4_K_S", "stock Q4_0", "stock Q8_0", "stock F16")):
        y = 66 + 46 * i
        parts.append(text(530, y + 18, name))
        for x, width, cell in ((630, 0.32, measured[name][0]), (835, 0.9, measured[name][1])):
            low, high = between(cell)
            kind = "out" if name == "AGQ4" else "box"
            parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{low * width:.1f}" height="26"/>')
            if high > low:  # the range that was seen
                parts.append(f'<path class="axis" d="M{x + low * width:.1f} {y + 13}H{x + high * width:.1f}m0 -6v12"/>')
            shown = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            parts.append(text(round(x + high * width + 5, 1), y + 18, shown))
    parts.append(text(530, 386, "1.1B LLaMA shape, random weights, every matrix in one type,"))
    parts.append(text(530, 402, "2 threads, 2-core Zen 4 server with AVX-512 VNNI, 28 November 2026"))
    return parts


FIGURES = {"pipeline": pipeline, "trip": trip, "tile": tile, "comparison": comparison}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")
