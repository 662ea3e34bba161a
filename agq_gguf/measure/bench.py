"""Measures speed, memory use and load time of several models in one run.

``python -m agq_gguf.measure.bench MODEL THREADS FLASH`` measures the load time of one model in its own process and
writes one line of JSON; `measure_start` runs it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from agq_gguf import errors
from agq_gguf.arguments import Progress, no_progress
from agq_gguf.errors import AgqError, HostError, InputError
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.library import llama_api
from agq_gguf.runtime.model import Batch, Context, FlashAttention, Model
from agq_gguf.runtime.model_file import prepare
from agq_gguf.runtime.profile import NodeTime, profiled

_UBATCH = 512
_WARM_UP_TOKENS = 8
_START_CONTEXT = 512


@dataclass(frozen=True)
class Speed:
    """Tokens per second in all repetitions."""

    tokens: int
    samples: list[float]
    median: float
    quartiles: tuple[float, float]
    ratio: float  # to the first model, of the medians

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float], first_seconds: Sequence[float]) -> Speed:
        """Speeds from the times of this model and of the first model, one time for each repetition."""
        samples = [tokens / s for s in seconds]
        quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        median = statistics.median(samples)
        ratio = median / statistics.median(tokens / t for t in first_seconds)
        return cls(tokens, samples, median, (quartiles[0], quartiles[2]), ratio)


@dataclass(frozen=True)
class Start:
    """Load time and memory of a fresh process that loads a model and computes one token."""

    first_token_seconds: float  # from opening the file to the first logits; libraries are loaded before
    resident_bytes: int | None  # memory of the process after that; None if the system does not say
    baseline_bytes: int | None  # memory of the process before it loads the model


@dataclass(frozen=True)
class Result:
    """Measurements of one model."""

    model: str
    file_bytes: int
    weight_bytes: int
    n_params: int
    prompt: Speed | None
    generation: Speed | None
    start: Start | None
    prompt_profile: list[NodeTime] = field(default_factory=list)  # from one extra run; empty if not requested
    generation_profile: list[NodeTime] = field(default_factory=list)


@dataclass(frozen=True)
class _Runner:
    """A loaded model with everything that the timed part needs, prepared in advance."""

    model: Model
    context: Context
    warm_up: Batch
    prompt: Batch | None
    generation: list[Batch]
    history: list[Batch]  # the content of the cache before generation

    def time_prompt(self) -> float:
        """Seconds for the whole prompt at once, with an empty cache."""
        assert self.prompt is not None
        self.context.clear()
        begin = time.perf_counter()
        self.context.decode(self.prompt)
        return time.perf_counter() - begin

    def prepare_generation(self) -> None:
        """Fills the cache with `history`."""
        self.context.clear()
        for batch in self.history:
            self.context.decode(batch)

    def time_generation(self) -> float:
        """Seconds for all steps, each with one token per sequence."""
        decode = self.context.decode
        begin = time.perf_counter()
        for batch in self.generation:
            decode(batch)
        return time.perf_counter() - begin

    def profiles(self, prompt: int, generation: int) -> tuple[list[NodeTime], list[NodeTime]]:
        """Node times of one prompt and of one generation; empty for a length of 0."""
        found: list[list[NodeTime]] = []
        for tokens, run in ((prompt, self.time_prompt), (generation, self.time_generation)):
            times: list[NodeTime] = []
            if tokens and run == self.time_generation:
                self.prepare_generation()
            if tokens:
                with profiled() as times:
                    run()
            found.append(times)
        return found[0], found[1]


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    prompt: int = 512,
    generation: int = 128,
    depth: int = 0,
    sequences: int = 1,
    threads: int = 0,
    repetitions: int = 5,
    flash_attention: FlashAttention = "auto",
    starts: bool = True,
    profile: bool = False,
    progress: Progress = no_progress,
) -> list[Result]:
    """Measures all models. `prompt` or `generation` 0 skips that part; `starts` False skips the load times.

    Generation begins with `depth` tokens in the cache. Each step computes one token in each of `sequences` sequences,
    and the speed counts the tokens of all of them. `profile` runs each part once more and measures the time per kind of
    node; this needs at least one model with AGQ4 tensors.

    All models are loaded at once and alternate within each repetition, so that other work on the machine slows all of
    them. Compare ratios within a run, not speeds of different runs. Raises InputError or HostError.
    """
    if not paths:
        raise InputError("bench needs at least one model")
    if prompt < 0 or generation < 0 or prompt + generation == 0:
        raise InputError(
            f"prompt and generation must be at least 0 tokens, and not both 0, got {prompt} and {generation}"
        )
    if repetitions < 1 or sequences < 1 or depth < 0:
        raise InputError(
            "repetitions and sequences must be at least 1 and depth at least 0, "
            f"got {repetitions}, {sequences} and {depth}"
        )
    threads = threads or default_threads()
    # Measures load times first, because models loaded in this process would take memory from the fresh processes.
    total = len(paths) * (repetitions + 1 + starts)
    started: list[Start | None] = []
    for index, path in enumerate(paths):
        prepare(path)
        if starts:
            progress("bench", index, total, f"loading {Path(path).name}")
        started.append(measure_start(path, threads, flash_attention) if starts else None)
    done = len(paths) if starts else 0
    times: list[dict[str, list[float]]] = [{"prompt": [], "generation": []} for _ in paths]
    with ExitStack() as stack:
        runners = []
        for path in paths:
            progress("bench", done, total, f"warm-up of {Path(path).name}")
            runners.append(_load(stack, path, prompt, generation, depth, sequences, threads, flash_attention))
            done += 1
        for repetition in range(repetitions):
            for runner, seconds in zip(runners, times, strict=True):
                progress("bench", done, total, f"repetition {repetition + 1}, {runner.model.path.name}")
                if prompt:
                    seconds["prompt"].append(runner.time_prompt())
                if generation:
                    # The warm-up has already filled the cache up to the point where generation begins.
                    if prompt:
                        runner.prepare_generation()
                    else:
                        runner.context.forget(depth)
                    seconds["generation"].append(runner.time_generation())
                done += 1
        profiles = [runner.profiles(prompt, generation) if profile else ([], []) for runner in runners]
        progress("bench", total, total, "")
        facts = [(r.model.path.stat().st_size, r.model.size, r.model.n_params) for r in runners]
    results = []
    for path, (file_bytes, weight_bytes, n_params), own, start, nodes in zip(
        paths, facts, times, started, profiles, strict=True
    ):
        speeds = {
            part: Speed.of(tokens, own[part], times[0][part]) if tokens else None
            for part, tokens in (("prompt", prompt), ("generation", generation * sequences))
        }
        results.append(
            Result(str(path), file_bytes, weight_bytes, n_params, speeds["prompt"], speeds["generation"], start, *nodes)
        )
    return results


def _load(
    stack: ExitStack,
    path: str | os.PathLike[str],
    prompt: int,
    generation: int,
    depth: int,
    sequences: int,
    threads: int,
    flash_attention: FlashAttention,
) -> _Runner:
    """Loads a model and warms it up."""
    model = stack.enter_context(Model(path))
    model.require_logits()
    size = max(prompt, depth + generation, sequences, _WARM_UP_TOKENS)
    context = stack.enter_context(
        model.context(size, n_ubatch=_UBATCH, threads=threads, flash_attention=flash_attention, sequences=sequences)
    )
    # Models with the same vocabulary get the same tokens, because tokens choose experts, which affects the time.
    tokens = np.random.default_rng(0).integers(model.n_vocab, size=size).astype(np.int32)
    if model.add_bos:
        tokens[0] = model.bos
    runner = _Runner(
        model,
        context,
        Batch(tokens[:_WARM_UP_TOKENS]),
        Batch(tokens[:prompt]) if prompt else None,
        [Batch(tokens[i].repeat(sequences), first_position=depth + i, one_each=True) for i in range(generation)],
        [Batch(tokens[:depth], sequence=i) for i in range(sequences)] if depth else [],
    )
    context.decode(runner.warm_up)
    if prompt:
        runner.time_prompt()
    if generation:
        # A few tokens are enough: the prompt has read all weights, and this only sets up the graphs for generation.
        runner.prepare_generation()
        for batch in runner.generation[:_WARM_UP_TOKENS]:
            context.decode(batch)
    return runner


# load time of a model, in its own process


def measure_start(path: str | os.PathLike[str], threads: int = 0, flash_attention: FlashAttention = "auto") -> Start:
    """Loads a model in a fresh process. Raises the error of that process, or HostError if it ended without one."""
    command = [sys.executable, "-m", "agq_gguf.measure.bench", os.fspath(path), str(threads), flash_attention]
    # The child must find the package where this process found it, installed or not.
    package_folder = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH", "")]))
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": search}
    )
    lines = child.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"{path}: the process that loads it failed with status {child.returncode}: {last}") from None
    if "error" in answer:
        raise getattr(errors, answer["error"], AgqError)(answer["message"])
    return Start(**answer)


def _start(path: str, threads: int, flash_attention: FlashAttention) -> Start:
    llama_api()  # loads the libraries before the time is taken
    prepare(path)
    baseline = resident_bytes()
    begin = time.perf_counter()
    with Model(path) as model:
        model.require_logits()
        with model.context(
            min(_START_CONTEXT, model.n_ctx_train), threads=threads, flash_attention=flash_attention
        ) as c:
            batch = Batch([model.bos if model.add_bos else 0])
            c.decode(batch)
            c.logits(batch).argmax()
            return Start(time.perf_counter() - begin, resident_bytes(), baseline)


def resident_bytes() -> int | None:
    """Memory of this process in RAM, including mapped files; None if /proc does not exist."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    kilobytes = fields.get("VmRSS", "").split()
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _main(arguments: list[str]) -> None:
    """The child process of `measure_start`: prints one line of JSON with a Start or an error."""
    path, threads, flash_attention = arguments
    try:
        answer = asdict(_start(path, int(threads), flash_attention))  # type: ignore[arg-type]
    except AgqError as e:
        answer = {"error": type(e).__name__, "message": str(e)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
