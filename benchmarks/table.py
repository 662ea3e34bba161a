"""The whole table of speeds in one run: kernels against the machine's peaks, models against the stock types.

    python benchmarks/table.py FOLDER [--threads 2] [--kernel-bench build/dev/kernel_bench] [--only TEXT]

FOLDER gets the models that are missing: a LLaMA of 1.1B parameters' shape with random weights, in F16 (2.1 GB), Q4_0,
Q4_K_S and AGQ4. In each row the models take turns, and ratios are taken within the turns. About 10 minutes on two idle
cores, without making the models.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import random_model

from agq_gguf.bench import Result, bench, measure_start
from agq_gguf.host import quantize_stock

STOCK = ("q4_0", "q4_k_s")
Row = tuple[str, str, str]  # what, asked, found


def make_models(folder: Path, threads: int) -> dict[str, Path]:
    """Paths of all models by type, written where they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"1.1b-{name}.gguf" for name in ("f16", "agq4", *STOCK)}
    for name in ("f16", "agq4"):
        if not paths[name].exists():
            random_model.write("1.1b", name, str(paths[name]))
    for name in STOCK:
        if not paths[name].exists():
            quantize_stock(paths["f16"], paths[name], name, threads=threads)
    return paths


def kernel_rows(program: Path, threads: int) -> Iterator[Row]:
    """Share of the measured peak of products, and of the measured read bandwidth."""
    wanted = [(f"gemm {shape}, 512 tokens", "85%") for shape in ("2048x2048", "5632x2048", "2048x5632", "11008x4096")]
    wanted += [(f"gemv K 2048, {n} token{'s' * (n > 1)}", "95%") for n in (1, 2, 4, 8)]
    for filter_, asked in wanted:
        command = [program, "--threads", str(threads), "--repeat", "20", "--filter", filter_]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        line = next(line for line in lines if "group scales" not in line and "bits" not in line)
        found = re.search(r"([\d.]+ \S+) +([\d.]+%) of ([\d.]+ .*)", line)
        yield filter_, asked, f"{found[2]} ({found[1]} of {found[3]})" if found else line


def _ratio(results: list[Result], part: str, base: int = 0) -> str:
    """Speed of the last model, and its ratio to model `base` within the turns."""
    own, other = getattr(results[-1], part), getattr(results[base], part)
    pairs = sorted(a / b for a, b in zip(own.samples, other.samples, strict=True))
    return f"{pairs[len(pairs) // 2]:.2f}x ({own.median:.1f} to {other.median:.1f} tokens/s)"


def model_rows(paths: dict[str, Path], threads: int) -> Iterator[Row]:
    """Speeds against the stock types."""

    def run(names: tuple[str, ...], repetitions: int, **options: int) -> list[Result]:
        models = [paths[name] for name in names]
        fixed = {"threads": threads, "repetitions": repetitions, "starts": False}
        return bench(models, flash_attention="on", **{"prompt": 0, "generation": 0, **fixed, **options})  # type: ignore[arg-type]

    results = run(("q4_0", "f16", "agq4"), 5, prompt=512)
    yield "prompt of 512, to Q4_0", "3.0x", _ratio(results, "prompt")
    yield "prompt of 512, to F16", "4.4x", _ratio(results, "prompt", 1)
    for n in (32, 64):
        yield f"prompt of {n}, to Q4_0", "2.5x", _ratio(run(("q4_0", "agq4"), 15, prompt=n), "prompt")
    results = run(("q4_0", "q4_k_s", "agq4"), 5, generation=128)
    yield "generation of 128, to Q4_0", "1.10x", _ratio(results, "generation")
    yield "generation of 128, to Q4_K_S", "1.10x", _ratio(results, "generation", 1)
    results = run(("q4_0", "agq4"), 5, generation=64, sequences=4)
    yield "generation of 4 sequences, to Q4_0", "2.0x", _ratio(results, "generation")
    results = run(("q4_0", "q4_k_s", "agq4"), 5, generation=64, depth=2048)
    yield "generation behind 2048, to Q4_0", "1.10x", _ratio(results, "generation")
    yield "generation behind 2048, to Q4_K_S", "1.10x", _ratio(results, "generation", 1)
    yield "prompt of 4096, to Q4_0", "3.0x", _ratio(run(("q4_0", "agq4"), 2, prompt=4096), "prompt")


def start_rows(paths: dict[str, Path], threads: int) -> Iterator[Row]:
    """A fresh process up to its first token."""
    starts = {name: [measure_start(paths[name], threads, "on") for _ in range(3)] for name in ("q4_0", "agq4")}
    first = sorted(start.first_token_seconds for start in starts["agq4"])[1]
    resident = [starts[name][0].resident_bytes or 0 for name in ("agq4", "q4_0")]
    yield "load to first token, warm", "1.0 s", f"{first:.2f} s"
    yield "resident memory, to Q4_0", "0.6", f"{resident[0] / resident[1]:.2f} ({resident[0] >> 20} MiB)"


def main() -> None:
    """Print the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernel-bench", type=Path, default=Path("build/dev/kernel_bench"))
    parser.add_argument("--only", default="", help="parts whose name holds this: kernels, models, starts")
    arguments = parser.parse_args()
    paths = make_models(arguments.folder, arguments.threads)
    parts = {
        "starts": lambda: start_rows(paths, arguments.threads),
        "kernels": lambda: kernel_rows(arguments.kernel_bench.resolve(), arguments.threads),
        "models": lambda: model_rows(paths, arguments.threads),
    }
    print(
        f"| {arguments.threads} threads, {datetime.now():%Y-%m-%d %H:%M} | asked | found |\n|---|---|---|", flush=True
    )
    for name, part in parts.items():
        if arguments.only in name:
            for row in part():
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
