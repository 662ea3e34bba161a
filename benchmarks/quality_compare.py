"""Compares quality and size of AGQ4 and llama.cpp's own types, made from one float model and one calibration text.

    python benchmarks/quality_compare.py MODEL-f16.gguf --calibration A.txt --text B.txt --folder OUT [--agq X.gguf ...]

Each stock type gets an importance matrix of the calibration text (the mean squares that llama-imatrix collects, from
llama.cpp's graph). It is made twice: as llama-quantize makes it, and with token embedding and output matrix in Q8_0,
AGQ4's default, so that only the other matrices differ. All models run in the stock library. Prints a table in Markdown
with the figures of ``agq-gguf evaluate``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from agq_gguf.calibration.default_text import default_calibration
from agq_gguf.calibration.importance import importance
from agq_gguf.format import blocks
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.runtime.stock_quantize import STOCK_FILE_TYPES, quantize_stock


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True, help="a text file, or default: the text in the package")
    parser.add_argument("--text", type=Path, required=True, help="must not be the calibration text")
    parser.add_argument("--folder", type=Path, required=True, help="for the models; existing ones are reused")
    parser.add_argument("--agq", type=Path, nargs="*", default=[], help="AGQ4 files of the same model")
    parser.add_argument(
        "--types", nargs="*", default=["Q4_0", "Q4_K_S", "IQ4_XS"], choices=[name.upper() for name in STOCK_FILE_TYPES]
    )
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chunks", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    calibration = default_calibration() if args.calibration == "default" else Path(args.calibration)
    files: list[tuple[str, Path]] = []
    data: dict[str, np.ndarray] = {}
    for name in args.types:
        for large in (False, True):
            path = args.folder / f"{args.model.stem}-{name}{'-embedding-output-q8_0' if large else ''}.gguf"
            if not path.exists():
                data = data or importance(args.model, calibration, max_tokens=args.tokens, threads=args.threads)
                quantize_stock(args.model, path, name.lower(), args.threads, importance=data, tables_q8_0=large)
            files.append((name + (", embedding and output Q8_0" if large else ""), path))
    files += [(path.stem, path) for path in args.agq]
    text = args.text.read_text("utf-8")
    print("| type | kB | bpw | bpw of matrices that AGQ4 supports | KL x 1000 | perplexity | same top token |")
    print("|---|---|---|---|---|---|---|")
    for name, path in files:
        found = evaluate(path, args.model, text, chunks=args.chunks or None, threads=args.threads)
        info = inspect_file(path)
        inner = [t for t in info.tensors if len(t.shape) > 1 and t.name not in ("token_embd.weight", "output.weight")]
        inner = [t for t in inner if not blocks.shape_problem(*t.shape[-2:])]
        bits = 8 * sum(t.bytes for t in inner) / max(1, sum(int(np.prod(t.shape)) for t in inner))
        print(
            f"| {name} | {info.file_bytes / 1000:.0f} | {info.bits_per_weight:.2f} | {bits:.2f} "
            f"| {1000 * found.mean_kl:.3f} ± {1000 * found.mean_kl_error:.3f} | {found.perplexity:.4f} "
            f"| {100 * found.top1_agreement:.2f}% |",
            flush=True,
        )
    print(f"\nreference perplexity {found.reference_perplexity:.4f}, {found.positions} positions")


if __name__ == "__main__":
    main()
