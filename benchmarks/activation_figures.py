"""Measures the quality cost of runtime settings: activation bits per token, and the attention of the paper.

    python benchmarks/activation_figures.py model-f16.gguf model-agq4.gguf text.txt \\
        "" AGQ_ACT_BITS=4 "AGQ_ACT_BITS=mixed:0.5;score=first" AGQ_ATTENTION=paper

The text is cut into windows of 512 tokens. The first 448 tokens are the prompt, to which mixed bits apply. The last 64
are run in a second call, and their logits are compared with those of the float model. A setting is one or more
environment variables, separated by spaces; an empty setting changes nothing. With --speed nothing is compared; instead
prompts of 512 tokens are timed, and the settings alternate.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

import agq_gguf
from agq_gguf.logits import compare
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.text import read_text

PROMPT, REST = 448, 64


@contextmanager
def environment(setting: str) -> Iterator[None]:
    """Sets the variables of a setting inside the block, in which a context is created."""
    variables = dict(part.split("=", 1) for part in setting.split())
    os.environ.update(variables)
    yield
    for name in variables:
        del os.environ[name]


def logits(context: Context, window: np.ndarray) -> np.ndarray:
    """Logits of the last 64 tokens without the very last, whose next token is outside the window."""
    context.clear()
    context.decode(Batch(window[:PROMPT]))
    batch = Batch(window[PROMPT:-1], first_position=PROMPT, first_logits=0)
    context.decode(batch)
    return context.logits(batch).copy()


def time_prompts(model: Model, settings: list[str], threads: int, rounds: int) -> None:
    """Prints the median speed of each setting, and its ratio to the first setting."""
    window = np.random.default_rng(0).integers(260, model.n_vocab, PROMPT + REST).astype(np.int32)
    seconds: list[list[float]] = [[] for _ in settings]
    with ExitStack() as stack:
        contexts = []
        for setting in settings:
            with environment(setting):
                contexts.append(stack.enter_context(model.context(len(window), threads=threads)))
        for _ in range(rounds + 1):
            for found, context in zip(seconds, contexts, strict=True):
                context.clear()
                began = time.perf_counter()
                context.decode(Batch(window))
                found.append(time.perf_counter() - began)
    speeds = [len(window) / float(np.median(found[1:])) for found in seconds]  # the first round warms up
    for setting, speed in zip(settings, speeds, strict=True):
        print(f"{setting or 'no setting':45} {speed:7.1f} tokens/s  ({speed / speeds[0]:.2f})")


def main() -> None:
    """Prints one line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("settings", nargs="*", default=[""])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", type=int, metavar="ROUNDS", help="measure speed in this many rounds")
    args = parser.parse_args()
    agq_gguf.register()
    if args.speed:
        with quiet_log(), Model(args.model) as model:
            time_prompts(model, args.settings, args.threads, args.speed)
        return
    with ExitStack() as stack:
        stack.enter_context(quiet_log())
        reference, model = (stack.enter_context(Model(path)) for path in (args.reference, args.model))
        size = PROMPT + REST
        make = {"n_ctx": size, "threads": args.threads}
        exact = stack.enter_context(reference.context(**make))
        contexts = []
        for setting in args.settings:
            with environment(setting):
                contexts.append(stack.enter_context(model.context(**make)))
        tokens = reference.tokenize(read_text(args.text))
        windows = tokens[: len(tokens) // size * size].reshape(-1, size)[: args.windows].copy()
        if reference.add_bos:
            windows[:, 0] = reference.bos
        scored: list[list[np.ndarray]] = [[] for _ in contexts]
        for window in tqdm(windows):
            wanted, targets = logits(exact, window), window[PROMPT + 1 :]
            for rows, context in zip(scored, contexts, strict=True):
                rows.append(compare(wanted, logits(context, window), targets))
    print(f"{len(windows)} windows; perplexity of the float model {np.exp(np.concatenate(scored[0])[:, 0].mean()):.4f}")
    for setting, rows in zip(args.settings, scored, strict=True):
        by_window = [part[:, 2].mean() for part in rows]
        error = np.std(by_window, ddof=1) / np.sqrt(len(by_window))
        nll, agree = (np.concatenate(rows)[:, i].mean() for i in (1, 3))
        print(
            f"{setting or 'no setting':45} KL {np.mean(by_window):.5f} +- {error:.5f}"
            f"  perplexity {np.exp(nll):.4f}  same most likely token {agree:.2%}"
        )


if __name__ == "__main__":
    main()
