"""Prints the table of speeds: kernels compared with the machine's peaks, models compared with the stock types.

    python benchmarks/table.py FOLDER [--threads 2] [--only PART,PART] [--avx2-library FOLDER]
                               [--kernel-bench build/dev/kernel_bench]

Missing models are written to FOLDER: a LLaMA in the shape of 1.1B parameters with random weights, in F16 (2.1 GB),
Q4_0, Q4_K_S and AGQ4, and four layers of a 7B shape in Q4_0 and AGQ4. Each row is one run in which the models
alternate; a ratio is the median of the ratios within the repetitions, with the smallest and the largest. It takes about
12 minutes on two idle cores, without making the models. Parts can be run alone: starts, kernels, prompt, short,
generation, overhead, sequences, depth, long, wide, plugin, avx2. The last one needs a copy of llama-cpp-python's
libraries whose libggml-cpu was built only for AVX2.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import random_model
from turns import Runner

from agq_gguf.measure.bench import Result, bench, measure_start
from agq_gguf.runtime.model import FlashAttention
from agq_gguf.runtime.stock_quantize import quantize_stock

STOCK = ("q4_0", "q4_k_s")
Row = tuple[str, str, str]  # what is measured, target, result


def make_models(folder: Path, threads: int, wide: bool = True) -> dict[str, Path]:
    """Paths of all models by type; writes those that are missing. The wide ones are "wide-q4_0" and "wide-agq4"."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"1.1b-{name}.gguf" for name in ("f16", "agq4", *STOCK)}
    for name in ("f16", "agq4"):
        if not paths[name].exists():
            random_model.write("1.1b", name, str(paths[name]))
    for name in STOCK:
        if not paths[name].exists():
            quantize_stock(paths["f16"], paths[name], name, threads=threads)
    paths |= {f"thin-{name}": folder / f"thin-{name}.gguf" for name in ("f16", "agq4", "q4_0")}
    for name in ("f16", "agq4"):
        if not paths[f"thin-{name}"].exists():
            random_model.write("thin", name, str(paths[f"thin-{name}"]))
    if not paths["thin-q4_0"].exists():
        quantize_stock(paths["thin-f16"], paths["thin-q4_0"], "q4_0", threads=threads)
    if not wide:
        return paths
    paths |= {f"wide-{name}": folder / f"7b-4-layers-{name}.gguf" for name in ("q4_0", "agq4")}
    if not paths["wide-agq4"].exists():
        random_model.write("7b", "agq4", str(paths["wide-agq4"]), layers=4)
    if not paths["wide-q4_0"].exists():
        source = folder / "7b-4-layers-f16.gguf"
        random_model.write("7b", "f16", str(source), layers=4)
        quantize_stock(source, paths["wide-q4_0"], "q4_0", threads=threads)
        source.unlink()
    return paths


def ratio(own: Sequence[float], other: Sequence[float], note: str = "") -> str:
    """Median of own / other within each repetition, and the range; both are speeds in tokens per second."""
    pairs = sorted(a / b for a, b in zip(own, other, strict=True))
    speeds = f"{statistics.median(own):.1f} to {statistics.median(other):.1f} tokens/s"
    return f"{statistics.median(pairs):.2f}x [{pairs[0]:.2f} - {pairs[-1]:.2f}] ({speeds}{note})"


@dataclass(frozen=True)
class Table:
    """The parts of the table, and what they share."""

    paths: dict[str, Path]
    threads: int
    kernel_bench: Path
    avx2_library: Path | None

    def starts(self) -> Iterator[Row]:
        """Load time of a fresh process, up to its first token."""
        starts = {name: [measure_start(self.paths[name], self.threads, "on") for _ in range(3)] for name in _PAIR}
        first = sorted(start.first_token_seconds for start in starts["agq4"])
        resident = [starts[name][0].resident_bytes or 0 for name in ("agq4", "q4_0")]
        yield "load to first token, warm", "1.0 s", f"{first[1]:.2f} s [{first[0]:.2f} - {first[2]:.2f}]"
        yield "resident memory, to Q4_0", "0.6", f"{resident[0] / resident[1]:.2f} ({resident[0] >> 20} MiB)"

    def kernels(self) -> Iterator[Row]:
        """Shares of the measured peak of multiplications, and of the measured read bandwidth."""
        shapes = ("2048x2048", "5632x2048", "2048x5632", "11008x4096")
        wanted = [(f"gemm {shape}, 512 tokens", "85%") for shape in shapes]
        wanted += [(f"gemv K 2048, {n} token{'s' * (n > 1)}", "95%") for n in (1, 2, 4, 8)]
        for filter_, asked in wanted:
            command = [str(self.kernel_bench), "--threads", str(self.threads), "--repeat", "30", "--filter", filter_]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
            line = next(line for line in lines if "group scales" not in line and "bits" not in line)
            found = re.search(r"([\d.]+ \S+) +([\d.]+%) of ([\d.]+ .*)", line)
            yield filter_, asked, f"{found[2]} ({found[1]} of {found[3]})" if found else line

    def _bench(self, names: tuple[str, ...], repetitions: int, **options: int) -> list[Result]:
        """One result for each name.

        The first model is loaded once more before them and does not count: the memory that a machine gives first was
        measured to be slower, by 12% of the speed of generation.
        """
        models = [self.paths[name] for name in (names[0], *names)]
        fixed = {"threads": self.threads, "repetitions": repetitions, "starts": False}
        return bench(models, flash_attention="on", **{"prompt": 0, "generation": 0, **fixed, **options})[1:]  # type: ignore[arg-type]

    @staticmethod
    def _rows(what: str, asked: Sequence[str], results: list[Result], part: str) -> Iterator[Row]:
        """The last result compared with each of the others."""
        own = getattr(results[-1], part).samples
        for result, wanted in zip(results[:-1], asked, strict=True):
            name = Path(result.model).stem.split("-")[-1].upper()
            yield f"{what}, to {name}", wanted, ratio(own, getattr(result, part).samples)

    def prompt(self) -> Iterator[Row]:
        """A prompt of 512 tokens."""
        results = self._bench(("q4_0", "f16", "agq4"), 3, prompt=512)
        yield from self._rows("prompt of 512", ("3.0x", "4.4x"), results, "prompt")

    def short(self) -> Iterator[Row]:
        """Prompts of 32 and 64 tokens."""
        for n in (32, 64):
            yield from self._rows(f"prompt of {n}", ("2.5x",), self._bench(_PAIR, 15, prompt=n), "prompt")

    def generation(self) -> Iterator[Row]:
        """Generation of 128 tokens, from an empty context."""
        results = self._bench(("q4_0", "q4_k_s", "agq4"), 3, generation=128)
        yield from self._rows("generation of 128", ("1.10x", "1.10x"), results, "generation")

    def overhead(self) -> Iterator[Row]:
        """The cost of the calls: a step of generation with matrices too small to matter."""
        results = self._bench(("thin-q4_0", "thin-agq4"), 7, generation=256)
        stock, own = (
            [1e6 / speed for speed in (result.generation.samples if result.generation else [])] for result in results
        )
        more = sorted(b - a for a, b in zip(stock, own, strict=True))
        found = (
            f"{statistics.median(more):+.0f} us [{more[0]:+.0f} - {more[-1]:+.0f}] ({statistics.median(stock):.0f} us)"
        )
        yield "step of 22 layers of 128 columns, to Q4_0", "", found

    def sequences(self) -> Iterator[Row]:
        """Generation of four sequences at the same time."""
        results = self._bench(_PAIR, 5, generation=32, sequences=4)
        yield from self._rows("generation of 4 sequences", ("2.0x",), results, "generation")

    def depth(self) -> Iterator[Row]:
        """Generation with 2048 tokens of context."""
        results = self._bench(("q4_0", "q4_k_s", "agq4"), 4, generation=32, depth=2048)
        yield from self._rows("generation with 2048 tokens of context", ("1.10x", "1.10x"), results, "generation")

    @staticmethod
    def _turns(
        repetitions: int, parts: dict[str, int], runners: Sequence[Callable[[], Runner]]
    ) -> dict[str, list[list[float]]]:
        """Speeds of processes that alternate, every second time in reverse order; `parts` maps parts to tokens."""
        speeds: dict[str, list[list[float]]] = {part: [[] for _ in runners] for part in parts}
        with ExitStack() as stack:
            stack.enter_context(runners[0]())  # only occupies the memory that the machine gives first, see `_bench`
            running = [(i, stack.enter_context(start())) for i, start in enumerate(runners)]
            for _ in range(repetitions):
                for part, tokens in parts.items():
                    for i, runner in running:
                        speeds[part][i].append(tokens / runner.seconds(part))
                running.reverse()
        return speeds

    def _runner(self, name: str, flash: FlashAttention, **options: object) -> Callable[[], Runner]:
        return lambda: Runner(self.paths[name], threads=self.threads, flash=flash, **options)  # type: ignore[arg-type]

    def long(self) -> Iterator[Row]:
        """A prompt of 4096 tokens; for the stock type, the faster setting of flash attention counts."""
        wanted = (("q4_0", "on"), ("q4_0", "off"), ("agq4", "on"))
        runners = [self._runner(name, flash, prompt=4096) for name, flash in wanted]  # type: ignore[arg-type]
        on, off, own = self._turns(1, {"prompt": 4096}, runners)["prompt"]
        note = f"; flash attention of Q4_0 on {on[0]:.1f}, off {off[0]:.1f}"
        yield "prompt of 4096, to Q4_0", "3.0x", ratio(own, max(on, off), note)

    def wide(self) -> Iterator[Row]:
        """Matrices as wide as in 7B models."""
        results = self._bench(("wide-q4_0", "wide-agq4"), 3, prompt=512)
        yield from self._rows("prompt of 512, 4 layers of 7B", ("3.0x",), results, "prompt")
        results = self._bench(("wide-q4_0", "wide-agq4"), 3, generation=64)
        yield from self._rows("generation, 4 layers of 7B", ("1.10x",), results, "generation")

    def plugin(self) -> Iterator[Row]:
        """A stock model in a process with the plugin, compared with a process without it."""
        flashes: tuple[FlashAttention, ...] = ("on", "off", "auto")
        for flash in flashes:
            parts = {"prompt": 128, "generation": 32}
            runners = [self._runner("q4_0", flash, register=register, **parts) for register in (True, False)]
            for part, speeds in self._turns(5, parts, runners).items():
                yield f"Q4_0 with the plugin, {part}, flash {flash}, to without", "0.98x", ratio(speeds[0], speeds[1])

    def avx2(self) -> Iterator[Row]:
        """All kernels limited to AVX2."""
        if self.avx2_library is None:
            yield "prompt of 512 on AVX2, to Q4_0", "2.0x", "not measured: no --avx2-library"
            return
        environment = {"LLAMA_CPP_LIB_PATH": str(self.avx2_library.resolve()), "AGQ_FORCE_ISA": "avx2"}
        runners = [self._runner(name, "on", prompt=512, environment=environment) for name in ("agq4", "q4_0")]
        own, stock = self._turns(3, {"prompt": 512}, runners)["prompt"]
        yield "prompt of 512 on AVX2, to Q4_0", "2.0x", ratio(own, stock)


_PAIR = ("q4_0", "agq4")
PARTS = (
    "starts",
    "kernels",
    "prompt",
    "short",
    "generation",
    "overhead",
    "sequences",
    "depth",
    "long",
    "wide",
    "plugin",
    "avx2",
)


def main() -> None:
    """Prints each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernel-bench", type=Path, default=Path("build/dev/kernel_bench"))
    parser.add_argument("--avx2-library", type=Path, help="libraries as in llama_cpp/lib, built for AVX2 only")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts must be from {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    paths = make_models(arguments.folder, arguments.threads, wide="wide" in parts)
    table = Table(paths, arguments.threads, arguments.kernel_bench.resolve(), arguments.avx2_library)
    print(
        f"| {arguments.threads} threads, {datetime.now():%Y-%m-%d %H:%M} | target | measured |\n|---|---|---|",
        flush=True,
    )
    for name in parts:
        for row in getattr(table, name)():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
