"""Draws the pictures of docs/how-it-works.md as SVG; readable on light and dark pages.

python docs/figures/make_figures.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
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


FIGURES = {"pipeline": pipeline, "trip": trip, "tile": tile}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")
