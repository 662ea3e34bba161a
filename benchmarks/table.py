"""Prints the table of speeds: kernels compared with the machine's peaks, models compared with the stock types.

    python benchmarks/table.py FOLDER [--threads 2] [--only PART,PART] [--peer NAME=PATH,MODEL[,ARGUMENTS]]
                               [--avx2-library FOLDER] [--kernel-bench build/dev/kernel_bench]

Missing models are written to FOLDER (about 15 GB for all parts): a LLaMA in the shape of 1.1B parameters with random
weights in AGQ4 and the stock types, four layers of a 7B shape, and a few layers of three mixtures of experts. Each row
is one run in which the models alternate. Its ratio is that to the fastest stock type of that row: the median of the
ratios within the repetitions, with the smallest and the largest. `--peer` adds a llama-bench of another project, such
as ik_llama.cpp's, with a model of the same shape; it runs in turn with the others, and the ratio to it is given too:

    --peer "ik=ik_llama.cpp/build/bin/llama-bench,1.1b-iq4_ks.gguf,-rtr 1"

It takes about 40 minutes on two idle cores, without making the models. Parts can be run alone: starts, kernels, prompt,
short, generation, overhead, sequences, depth, long, experts, wide, plugin, avx2. The last one needs a copy of
llama-cpp-python's libraries whose libggml-cpu was built only for AVX2.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import random_experts
import random_model
from turns import Runner

from agq_gguf.measure.bench import bench, measure_start
from agq_gguf.runtime.model import FlashAttention
from agq_gguf.runtime.stock_quantize import quantize_stock

OWN = "agq4"
FOUR_BITS = ("q4_0", "q4_k_s", "iq4_xs")
STOCK = (*FOUR_BITS, "q6_k", "q8_0", "f16")
EXPERTS = {"gpt-oss-20b": 3, "qwen3-30b-a3b": 3, "deepseek-v2-lite": 4}  # layers; the first of DeepSeek has no experts
EXPERT_STOCK = ("q4_0", "iq4_nl")  # these shapes have columns that other 4-bit types cannot have
PARTS = (
    "starts", "kernels", "prompt", "short", "generation", "overhead", "sequences", "depth", "long", "experts", "wide",
    "plugin", "avx2",
)  # fmt: skip
Row = tuple[str, str]  # what is measured, result


class Models:
    """The models of a folder; those that are missing are written when they are first asked for."""

    def __init__(self, folder: Path, threads: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.threads = folder, threads

    def __call__(self, shape: str, kind: str) -> Path:
        """The file of a shape ("1.1b", "thin", "7b" or one of EXPERTS) and a type."""
        path = self.folder / f"{shape}-{kind}.gguf"
        if path.exists():
            return path
        if shape in EXPERTS:
            random_experts.write(random_experts.SHAPES[shape], kind, str(path), EXPERTS[shape])
        elif kind in ("f16", OWN):
            random_model.write(shape, kind, str(path), layers=4 if shape == "7b" else 0)
        else:
            quantize_stock(self(shape, "f16"), path, kind, threads=self.threads)
        return path


@dataclass(frozen=True)
class Peer:
    """A llama-bench of another project, and a model for it."""

    name: str
    program: Path
    model: Path
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Peer:
        """From NAME=PATH,MODEL[,ARGUMENTS]. Raises ValueError."""
        name, _, rest = text.partition("=")
        program, model, *arguments = rest.split(",", 2)
        return cls(name, Path(program), Path(model), tuple(" ".join(arguments).split()))

    def speed(self, threads: int, prompt: int, generation: int, depth: int) -> float:
        """Tokens per second of one run."""
        command = [self.program, "-m", self.model, "-t", threads, "-p", prompt, "-n", generation, "-fa", 1, "-r", 1]
        command += ["-o", "json", *(["-d", depth] if depth else []), *self.arguments]
        shown = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        return float(json.loads(shown.stdout)[0]["avg_ts"])


def ratio(own: Sequence[float], other: Sequence[float]) -> str:
    """Median of own / other within each repetition, and the range; both are speeds in tokens per second."""
    pairs = sorted(a / b for a, b in zip(own, other, strict=True))
    return f"{statistics.median(pairs):.2f} [{pairs[0]:.2f} to {pairs[-1]:.2f}]"


@dataclass(frozen=True)
class Table:
    """The parts of the table, and what they share."""

    models: Models
    threads: int
    kernel_bench: Path
    avx2_library: Path | None
    peers: list[Peer] = field(default_factory=list)

    def starts(self) -> Iterator[Row]:
        """Load time of a fresh process, up to its first token."""
        kinds = (OWN, "q4_0")
        runs = {
            kind: [measure_start(self.models("1.1b", kind), self.threads, "on") for _ in range(3)] for kind in kinds
        }
        first = sorted(start.first_token_seconds for start in runs[OWN])
        own, stock = (runs[kind][0].resident_bytes or 0 for kind in kinds)
        yield "load to first token, file in the page cache", f"{first[1]:.2f} s [{first[0]:.2f} to {first[2]:.2f}]"
        yield "resident memory, to Q4_0", f"{own / stock:.2f} ({own >> 20} MiB)"

    def kernels(self) -> Iterator[Row]:
        """Shares of the measured peak of multiplications, and of the measured read bandwidth."""
        wanted = [f"gemm {shape}, 512 tokens" for shape in ("2048x2048", "5632x2048", "2048x5632", "11008x4096")]
        wanted += [f"gemv K 2048, {n} token{'s' * (n > 1)}" for n in (1, 2, 4, 8)]
        for filter_ in wanted:
            command = [str(self.kernel_bench), "--threads", str(self.threads), "--repeat", "30", "--filter", filter_]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
            line = next(line for line in lines if "group scales" not in line and "bits" not in line)
            found = re.search(r"([\d.]+ \S+) +([\d.]+%) of ([\d.]+ .*)", line)
            yield filter_, f"{found[2]} ({found[1]} of {found[3]})" if found else line

    def _speeds(
        self, shape: str, kinds: Sequence[str], repetitions: int, peers: Sequence[Peer] = (), **options: int
    ) -> dict[str, list[float]]:
        """Tokens per second of every repetition, by type and by peer.

        The first model is loaded once more before them and does not count: the memory that a machine gives first was
        measured to be slower, by 12% of the speed of generation.
        """
        paths = [self.models(shape, kind) for kind in (kinds[0], *kinds)]
        part = "prompt" if "prompt" in options else "generation"
        speeds: dict[str, list[float]] = {kind: [] for kind in (*kinds, *(peer.name for peer in peers))}
        # Programs of others can only run between two runs of ours.
        rounds, inner = (repetitions, 1) if peers else (1, repetitions)
        for _ in range(rounds):
            results = bench(
                paths, flash_attention="on", threads=self.threads, repetitions=inner, starts=False,
                **{"prompt": 0, "generation": 0, **options},  # type: ignore[arg-type]
            )[1:]  # fmt: skip
            for kind, result in zip(kinds, results, strict=True):
                speeds[kind] += getattr(result, part).samples
            for peer in peers:
                sizes = (options.get(name, 0) for name in ("prompt", "generation", "depth"))
                speeds[peer.name].append(peer.speed(self.threads, *sizes))
        return speeds

    def _row(
        self, what: str, shape: str, stock: Sequence[str], repetitions: int, peers: Sequence[Peer] = (), **options: int
    ) -> Row:
        """AGQ4 beside the fastest of the stock types, Q4_0 and all peers."""
        speeds = self._speeds(shape, (*stock, OWN), repetitions, peers, **options)
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        best = max(stock, key=lambda kind: medians[kind])
        shown = [f"{ratio(speeds[OWN], speeds[best])} of {best.upper()}"]
        others = (["q4_0"] if best != "q4_0" else []) + [peer.name for peer in peers]
        shown += [f"{ratio(speeds[OWN], speeds[name])} of {name.upper() if name in stock else name}" for name in others]
        each = ", ".join(
            f"{name.upper() if name in stock else name} {medians[name]:.1f}" for name in speeds if name != OWN
        )
        return what, f"{'; '.join(shown)} ({medians[OWN]:.1f} tokens/s; {each})"

    def prompt(self) -> Iterator[Row]:
        """A prompt of 512 tokens."""
        yield self._row("prompt of 512", "1.1b", STOCK, 3, self.peers, prompt=512)

    def short(self) -> Iterator[Row]:
        """Prompts of 32 and 64 tokens."""
        for n in (32, 64):
            yield self._row(f"prompt of {n}", "1.1b", FOUR_BITS, 7, self.peers, prompt=n)

    def generation(self) -> Iterator[Row]:
        """Generation of 128 tokens, from an empty context."""
        yield self._row("generation of 128", "1.1b", STOCK, 3, self.peers, generation=128)

    def overhead(self) -> Iterator[Row]:
        """The cost of the calls: a step of generation with matrices too small to matter."""
        speeds = self._speeds("thin", ("q4_0", OWN), 7, generation=256)
        stock, own = ([1e6 / speed for speed in speeds[kind]] for kind in ("q4_0", OWN))
        more = sorted(b - a for a, b in zip(stock, own, strict=True))
        found = f"{statistics.median(more):+.0f} us [{more[0]:+.0f} to {more[-1]:+.0f}]"
        yield "a step of 22 layers of 128 columns, more than Q4_0's", f"{found} of {statistics.median(stock):.0f} us"

    def sequences(self) -> Iterator[Row]:
        """Generation of several sequences at the same time."""
        for n in (4, 8, 16):
            yield self._row(f"generation of {n} sequences", "1.1b", FOUR_BITS, 3, generation=32, sequences=n)

    def depth(self) -> Iterator[Row]:
        """Generation behind many tokens."""
        for n in (2048, 4096):
            yield self._row(f"generation behind {n} tokens", "1.1b", FOUR_BITS, 3, self.peers, generation=32, depth=n)

    @staticmethod
    def _turns(
        repetitions: int, parts: dict[str, int], runners: Sequence[Callable[[], Runner]]
    ) -> dict[str, list[list[float]]]:
        """Speeds of processes that alternate, every second time in reverse order; `parts` maps parts to tokens."""
        speeds: dict[str, list[list[float]]] = {part: [[] for _ in runners] for part in parts}
        with ExitStack() as stack:
            stack.enter_context(runners[0]())  # only occupies the memory that the machine gives first, see `_speeds`
            running = [(i, stack.enter_context(start())) for i, start in enumerate(runners)]
            for _ in range(repetitions):
                for part, tokens in parts.items():
                    for i, runner in running:
                        speeds[part][i].append(tokens / runner.seconds(part))
                running.reverse()
        return speeds

    def _runner(self, kind: str, flash: FlashAttention, **options: object) -> Callable[[], Runner]:
        path = self.models("1.1b", kind)
        return lambda: Runner(path, threads=self.threads, flash=flash, **options)  # type: ignore[arg-type]

    def long(self) -> Iterator[Row]:
        """Long prompts, once each; for stock types, the faster setting of flash attention counts."""
        for n in (4096, 16384):
            settings: list[tuple[str, FlashAttention]] = [
                (kind, flash) for kind in FOUR_BITS for flash in ("on", "off")
            ]
            runners = [self._runner(kind, flash, prompt=n) for kind, flash in (*settings, (OWN, "on"))]
            *stock, [own] = self._turns(1, {"prompt": n}, runners)["prompt"]
            speeds = {
                f"{kind.upper()}, flash attention {flash}": speed
                for (kind, flash), [speed] in zip(settings, stock, strict=True)
            }
            best = max(speeds, key=lambda name: speeds[name])
            each = "; ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
            yield f"prompt of {n}", f"{own / speeds[best]:.2f} of {best} ({own:.1f} tokens/s; {each})"

    def experts(self) -> Iterator[Row]:
        """Mixtures of experts."""
        for shape in EXPERTS:
            for n in (512, 64):
                yield self._row(f"{shape}, prompt of {n}", shape, EXPERT_STOCK, 3, prompt=n)
            yield self._row(f"{shape}, generation", shape, EXPERT_STOCK, 5, generation=64)

    def wide(self) -> Iterator[Row]:
        """Matrices as wide as in 7B models."""
        yield self._row("4 layers of 7B, prompt of 512", "7b", FOUR_BITS, 3, prompt=512)
        yield self._row("4 layers of 7B, generation", "7b", FOUR_BITS, 3, generation=64)

    def plugin(self) -> Iterator[Row]:
        """A stock model in a process with the plugin, compared with a process without it."""
        flashes: tuple[FlashAttention, ...] = ("on", "off", "auto")
        for flash in flashes:
            parts = {"prompt": 128, "generation": 32}
            runners = [self._runner("q4_0", flash, register=register, **parts) for register in (True, False)]
            for part, speeds in self._turns(5, parts, runners).items():
                yield f"Q4_0 with the plugin, {part}, flash {flash}, to without", ratio(speeds[0], speeds[1])

    def avx2(self) -> Iterator[Row]:
        """All kernels limited to AVX2."""
        if self.avx2_library is None:
            yield "prompt of 512 on AVX2, to Q4_0", "not measured: no --avx2-library"
            return
        environment = {"LLAMA_CPP_LIB_PATH": str(self.avx2_library.resolve()), "AGQ_FORCE_ISA": "avx2"}
        runners = [self._runner(kind, "on", prompt=512, environment=environment) for kind in (OWN, "q4_0")]
        own, stock = self._turns(3, {"prompt": 512}, runners)["prompt"]
        yield "prompt of 512 on AVX2, to Q4_0", ratio(own, stock)


def main() -> None:
    """Prints each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernel-bench", type=Path, default=Path("build/dev/kernel_bench"))
    parser.add_argument("--avx2-library", type=Path, help="libraries as in llama_cpp/lib, built for AVX2 only")
    parser.add_argument("--peer", type=Peer.parse, action="append", default=[], metavar="NAME=PATH,MODEL[,ARGUMENTS]")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"parts must be from {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    models = Models(arguments.folder, arguments.threads)
    table = Table(models, arguments.threads, arguments.kernel_bench.resolve(), arguments.avx2_library, arguments.peer)
    print(f"| {arguments.threads} threads, {datetime.now():%Y-%m-%d %H:%M} | measured |\n|---|---|", flush=True)
    for name in parts:
        for row in getattr(table, name)():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
