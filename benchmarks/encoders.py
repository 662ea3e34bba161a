"""Compares AGQ4 with stock types on an encoder: 1 - cosine of its embeddings, and nearest neighbours kept.

    python benchmarks/encoders.py ENCODER-f16.gguf --calibration A.txt --text B.txt --folder OUT

All files are calibrated on the same text, the stock types by its importance matrix. Prints one row for each file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agq_gguf import QuantizeOptions, quantize
from agq_gguf.calibration.importance import importance
from agq_gguf.measure.embeddings import evaluate_embeddings
from agq_gguf.runtime.stock_quantize import quantize_stock
from agq_gguf.text import load_text


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_k_s"], help="llama.cpp's types")
    parser.add_argument("--qualities", nargs="+", default=["balanced", "best"])
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    parser.add_argument("--chunks", type=int, default=400, help="of 128 tokens to measure on")
    parser.add_argument("-t", "--threads", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    calibration, text = load_text(args.calibration), load_text(args.text)
    data = importance(args.model, calibration, max_tokens=args.tokens, threads=args.threads) if args.types else {}
    print("| file | MB | 1 - cosine x 1000 | largest | same nearest chunk |", flush=True)
    print("|---|---|---|---|---|")
    for name in [*args.types, *args.qualities]:
        made = args.folder / f"{name}.gguf"
        if name in args.types:
            quantize_stock(args.model, made, name, args.threads, importance=data)
        else:
            options = QuantizeOptions(quality=name, calibration_tokens=args.tokens, threads=args.threads)
            quantize(args.model, made, calibration=calibration, options=options)
        found = evaluate_embeddings(made, args.model, text, chunks=args.chunks, threads=args.threads)
        print(
            f"| {name} | {made.stat().st_size / 1e6:.1f} "
            f"| {1000 * found.mean_distance:.2f} ± {1000 * found.mean_distance_error:.2f} "
            f"| {1000 * found.max_distance:.1f} | {found.nearest_kept or 0:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
