"""Measures the cost of 8-bit activations with and without outliers: refinement, scales per group, equalization.

    python benchmarks/outlier_study.py MODEL-f16.gguf --calibration A.txt --text B.txt --folder OUT [--factor 30]

With --factor the model first gets outliers that do not change its function: a few channels of each norm's weight are
multiplied, and the columns that read them are divided. Every variant is quantized with agq_gguf and compared with the
float model twice: as it runs, and with its weights restored to F32, that is, with float activations. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from agq_gguf.format import blocks, reference
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.matrix import two_refine
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.measure.evaluate import evaluate
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.quantization.pipeline import quantize

BEHIND = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}
VARIANTS = {
    "one scale per token, nothing else": MatrixOptions(activation_scale="token", refine=False, equalize=False),
    "two-refine: exponents 0 and r": MatrixOptions(activation_scale="token", equalize=False),
    "general exponents and channel order": MatrixOptions(activation_scale="token", equalize=False),
    "equalization, general exponents": MatrixOptions(activation_scale="token"),
    "a scale per (token, 64)": MatrixOptions(activation_scale="group", refine=False, equalize=False),
    "a scale per (token, 64), rotated": MatrixOptions(refine=False, equalize=False),
    "equalization, a scale per (token, 64), rotated (default)": MatrixOptions(),
}


def rewrite(source: Path, target: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a copy of a model with other tensors, in F32."""
    with open_gguf(source) as reader:
        placed = layout((name, "f32", values.shape) for name, values in tensors.items())
        with Writer(target, reader.metadata, {}, placed) as writer:
            for name, values in tensors.items():
                writer.write(name, [np.ascontiguousarray(values, np.float32)])


def inject(source: Path, target: Path, factor: float, channels: int) -> None:
    """Writes a model with outliers that computes the same function."""
    with open_gguf(source) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
        layers = int(reader.get(f"{reader.architecture}.block_count"))
    rng = np.random.default_rng(0)
    for layer in range(layers):
        for norm, matrices in BEHIND.items():
            weight = tensors[f"blk.{layer}.{norm}.weight"]
            chosen = rng.choice(len(weight), channels, replace=False)
            weight[chosen] *= factor
            for name in matrices:
                tensors[f"blk.{layer}.{name}.weight"][:, chosen] /= factor
    rewrite(source, target, tensors)


def restore(source: Path, target: Path) -> None:
    """Writes a quantized model with restored float weights, which llama.cpp multiplies with float activations."""
    from gguf import GGMLQuantizationType, quants

    tensors = {}
    with open_gguf(source) as reader:
        for name, tensor in reader.tensors.items():
            raw = np.array(np.frombuffer(reader.raw(name), np.uint8))  # a copy: the mapping ends before
            if tensor.type_name == blocks.TYPE_NAME:
                tensors[name] = reference.dequantize(blocks.unpack(raw.reshape(tensor.shape[0], -1)))
            elif tensor.type_name == "q8_0":
                found = quants.dequantize(raw.reshape(tensor.shape[0], -1), GGMLQuantizationType.Q8_0)
                tensors[name] = found.reshape(tensor.shape)
            else:
                tensors[name] = reader.read(name)
    rewrite(source, target, tensors)


def two_values(maxima: np.ndarray) -> np.ndarray:
    """The paper's form of exponents: r for the groups with the largest peaks, 0 for all others; minimizes the cost."""
    best = np.zeros(maxima.shape[1], np.uint8)
    cost = two_refine._cost(maxima, best)
    by_peak = np.argsort(-maxima.max(axis=0), kind="stable")
    for r in range(1, 9):
        for k in range(1, len(by_peak)):
            trial = np.zeros(len(by_peak), np.uint8)
            trial[by_peak[:k]] = r
            if (found := two_refine._cost(maxima, trial)) < cost:
                best, cost = trial, found
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--factor", type=float, default=1.0, help="size of the outliers; 1: do not add any")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels per norm")
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8))
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--chunks", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.model
    if args.factor != 1:
        source = args.folder / "injected.gguf"
        inject(args.model, source, args.factor, args.channels)
    text = args.text.read_text("utf-8")
    print("| activations | KL x 1000, as run | KL x 1000, same weights, float activations | more |\n|---|---|---|---|")
    general = two_refine._descend
    for name, matrix in VARIANTS.items():
        two_refine._descend = two_values if name.startswith("two-refine") else general
        matrix = MatrixOptions(**{**matrix.__dict__, "activation_bits": args.bits})
        options = QuantizeOptions(
            quality=args.quality, matrix=matrix, threads=args.threads, calibration_tokens=args.tokens
        )
        made, floats = args.folder / "made.gguf", args.folder / "floats.gguf"
        quantize(source, made, calibration=args.calibration, options=options)
        restore(made, floats)
        kl = [
            evaluate(path, args.model, text, chunks=args.chunks or None, threads=args.threads).mean_kl
            for path in (made, floats)
        ]
        print(f"| {name} | {1000 * kl[0]:.3f} | {1000 * kl[1]:.3f} | {kl[0] / kl[1] - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
