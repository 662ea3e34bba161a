"""Compares calibration texts: the default text, other texts, and none, each measured on several kinds of text.

    python benchmarks/default_text.py MODEL-f16.gguf --folder OUT --calibration default none A.txt dialogues.json \
        --text B.txt code.py chat.json

A file that ends in .json holds dialogues like agq_gguf/data/default-calibration/dialogues; they are rendered with the
model's chat template. Prints the mean KL divergence times 1000 and its standard error, one row for each calibration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agq_gguf import QuantizeOptions, default_calibration, evaluate, quantize
from agq_gguf.calibration.default_text import read_pieces
from agq_gguf.text import LoadedText, load_text


def load(path: Path) -> LoadedText:
    """A text file as it is, or the dialogues of a .json file."""
    return LoadedText(path.name, (tuple(read_pieces(path)),)) if path.suffix == ".json" else load_text(path)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", nargs="+", required=True, help="text files, default, none")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="texts to measure on")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    parser.add_argument("--chunks", type=int, default=12, help="of each text that is measured on")
    parser.add_argument("-t", "--threads", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    options = QuantizeOptions(quality=args.quality, calibration_tokens=args.tokens, threads=args.threads)
    texts = [load(path) for path in args.text]
    print("| calibration | tokens |", " | ".join(text.name for text in texts), "|", flush=True)
    for name in args.calibration:
        made = args.folder / f"{Path(name).stem}.gguf"
        text = None if name == "none" else default_calibration() if name == "default" else load(Path(name))
        report = quantize(args.model, made, calibration=text, options=options)
        cells = []
        for measured in texts:
            found = evaluate(made, args.model, measured, chunks=args.chunks, threads=args.threads)
            cells.append(f"{1000 * found.mean_kl:.1f} ± {1000 * found.mean_kl_error:.1f}")
        print(f"| {report.guidance} |", " | ".join(cells), f"| {report.bits_per_weight:.2f} |", flush=True)


if __name__ == "__main__":
    main()
