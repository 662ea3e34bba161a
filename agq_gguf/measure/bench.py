"""Speed, memory and start of models, measured side by side.

``python -m agq_gguf.measure.bench MODEL THREADS FLASH`` measures the start of one model in a process of its own and
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
from agq_gguf.runtime.library import default_threads, llama_api
from agq_gguf.runtime.model import Batch, Context, FlashAttention, Model
from agq_gguf.runtime.model_file import prepare
from agq_gguf.runtime.profile import NodeTime, profiled

_UBATCH = 512
_WARM_UP_TOKENS = 8
_START_CONTEXT = 512


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the repetitions."""

    tokens: int
    samples: list[float]
    median: float
    quartiles: tuple[float, float]
    ratio: float  # to the first model: median of the ratios within each repetition

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float], first_seconds: Sequence[float]) -> Speed:
        """From the times of this model and of the first one, repetition by repetition."""
        samples = [tokens / s for s in seconds]
        quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        ratio = statistics.median(first / own for first, own in zip(first_seconds, seconds, strict=True))
        return cls(tokens, samples, statistics.median(samples), (quartiles[0], quartiles[2]), ratio)


@dataclass(frozen=True)
class Start:
    """A fresh process that loads a model and computes one token."""

    first_token_seconds: float  # from the open file to the first logits, libraries loaded before
    resident_bytes: int | None  # of the process then; None where the system does not tell
    baseline_bytes: int | None  # of the process before the model was loaded


@dataclass(frozen=True)
class Result:
    """What was measured of one model."""

    model: str
    file_bytes: int
    weight_bytes: int
    n_params: int
    prompt: Speed | None
    generation: Speed | None
    start: Start | None
    prompt_profile: list[NodeTime] = field(default_factory=list)  # of one more run of each part; empty if not wanted
    generation_profile: list[NodeTime] = field(default_factory=list)


@dataclass(frozen=True)
class _Runner:
    """A loaded model with everything that the timed part needs, built beforehand."""

    model: Model
    context: Context
    warm_up: Batch
    prompt: Batch | None
    generation: list[Batch]
    history: list[Batch]  # what is in the cache before the generation

    def time_prompt(self) -> float:
        """Seconds for the whole prompt at once, cache empty."""
        assert self.prompt is not None
        self.context.clear()
        begin = time.perf_counter()
        self.context.decode(self.prompt)
        return time.perf_counter() - begin

    def prepare_generation(self) -> None:
        """Fills the cache with what the generation follows."""
        self.context.clear()
        for batch in self.history:
            self.context.decode(batch)

    def time_generation(self) -> float:
        """Seconds for all steps of one token per sequence."""
        decode = self.context.decode
        begin = time.perf_counter()
        for batch in self.generation:
            decode(batch)
        return time.perf_counter() - begin

    def profiles(self, prompt: int, generation: int) -> tuple[list[NodeTime], list[NodeTime]]:
        """Node times of one prompt and of one generation, each left out if its length is 0."""
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
    """Measures all models; `prompt` or `generation` 0 leaves that part out, `starts` False the fresh processes.

    The generation begins with `depth` tokens in the cache, and steps by one token in each of `sequences` sequences;
    its speed counts the tokens of all of them. `profile` runs each part once more and says where the time goes; at
    least one model must hold AGQ4 tensors.

    All models are loaded at once and take turns within each repetition, so that a machine that slows down or is shared
    slows all of them: compare ratios rather than runs. Raises InputError or HostError.
    """
    if not paths:
        raise InputError("no model given")
    if prompt < 0 or generation < 0 or prompt + generation == 0 or repetitions < 1 or depth < 0 or sequences < 1:
        raise InputError("wanted: at least one repetition of a prompt or a generation of at least one token")
    threads = threads or default_threads()
    # Fresh processes first: the models loaded here would take memory from them.
    total = len(paths) * (repetitions + 1 + starts)
    started: list[Start | None] = []
    for index, path in enumerate(paths):
        prepare(path)
        if starts:
            progress("bench", index, total, f"start of {Path(path).name}")
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
                    # The warm-up, too, left the cache filled up to where the generation begins.
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
    """Loads a model and runs it once."""
    model = stack.enter_context(Model(path))
    model.require_logits()
    size = max(prompt, depth + generation, sequences, _WARM_UP_TOKENS)
    context = stack.enter_context(
        model.context(size, n_ubatch=_UBATCH, threads=threads, flash_attention=flash_attention, sequences=sequences)
    )
    # The same tokens for every model of a vocabulary: experts are chosen by token, and cost time.
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
        # A few tokens are enough: the prompt has touched all weights, this sets up the other shapes of graphs.
        runner.prepare_generation()
        for batch in runner.generation[:_WARM_UP_TOKENS]:
            context.decode(batch)
    return runner


# start of a model, in a process of its own


def measure_start(path: str | os.PathLike[str], threads: int = 0, flash_attention: FlashAttention = "auto") -> Start:
    """Loads a model in a fresh process. Raises what the process raised, or HostError if it died."""
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
        raise HostError(f"{path}: the process that loads it ended with status {child.returncode}: {last}") from None
    if "error" in answer:
        raise getattr(errors, answer["error"], AgqError)(answer["message"])
    return Start(**answer)


def _start(path: str, threads: int, flash_attention: FlashAttention) -> Start:
    llama_api()  # the time to load libraries does not depend on the model
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
    """Memory of this process that is in RAM, mapped files included; None where /proc does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    kilobytes = fields.get("VmRSS", "").split()
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _main(arguments: list[str]) -> None:
    """The child of `measure_start`: one line of JSON with a Start or with the error."""
    path, threads, flash_attention = arguments
    try:
        answer = asdict(_start(path, int(threads), flash_attention))  # type: ignore[arg-type]
    except AgqError as e:
        answer = {"error": type(e).__name__, "message": str(e)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
