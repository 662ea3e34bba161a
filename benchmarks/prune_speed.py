"""Measures the time that token pruning saves and costs, in the running library.

    python benchmarks/prune_speed.py MODEL --prune "3:0.5;score=recent" --prune "10:0.56;score=recent;keep=64;reach=2"

Each row is one setting; the settings alternate in one run, "off" first, and figures are medians. Prompts are random
tokens, so give shares, not thresholds. "decode" is one token after a prompt. Its overhead is the planning of a step
(the scan for dropped tokens, and masks). It is measured inside the plugin, because it is smaller than the noise of the
steps. This program made docs/research/pruning.md, "Speed".
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np

import agq_gguf
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.runtime.profile import profiled

PLANNING, REWRITING = "(planning what to prune)", "(rewriting the graph)"


def timed(context: Context, batch: Batch) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    context.decode(batch)
    return time.perf_counter() - begun


def parts(context: Context, batches: list[Batch]) -> dict[str, float]:
    """Milliseconds per call of the backend that are spent outside of graph nodes."""
    with profiled() as times:
        for batch in batches:
            context.decode(batch)
    return {t.kind: 1000 * t.seconds / len(batches) for t in times if t.kind in (PLANNING, REWRITING)}


def main() -> None:
    """Reads the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prune", action="append", default=[], help="a setting; may be repeated")
    parser.add_argument(
        "--prompt", type=int, action="append", help="prompt length; may be repeated (default: 512 and 2048)"
    )
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16, help="steps after each prompt, for each setting")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash-attention", choices=["on", "off"], default="on")
    args = parser.parse_args()
    settings = ["off", *args.prune]
    with Model(args.model) as model, ExitStack() as stack:
        for length in args.prompt or [512, 2048]:
            tokens = np.random.default_rng(length).integers(3, model.n_vocab, length).astype(np.int32)
            prompt = Batch(tokens)
            steps = [Batch(tokens[i : i + 1], first_position=length + i) for i in range(args.decode)]
            contexts = {}
            for spec in settings:
                with agq_gguf.options(prune=spec):
                    contexts[spec] = stack.enter_context(
                        model.context(
                            length + args.decode,
                            n_ubatch=args.ubatch,
                            threads=args.threads,
                            flash_attention=args.flash_attention,
                        )
                    )
            for context in contexts.values():  # warm-up: loads the pages of the file and of the caches
                context.decode(prompt)
            seconds: dict[str, list[float]] = {spec: [] for spec in settings}
            stepping: dict[str, list[float]] = {spec: [] for spec in settings}
            left = {}
            for _ in range(args.repetitions):
                for spec, context in contexts.items():
                    context.clear()
                    seconds[spec].append(timed(context, prompt))
                    left[spec] = float(np.mean(np.array(agq_gguf.last_pruned()) >= 0))
                for step in steps:  # the settings alternate at every step
                    for spec, context in contexts.items():
                        stepping[spec].append(timed(context, step))
            print(f"\nprompt of {length} tokens, calls of {args.ubatch}, {args.threads} threads, "
                  f"flash attention {args.flash_attention}")  # fmt: skip
            print("| setting | dropped | prompt, tokens/s | | decode, ms | planning of a prompt call / step, ms "
                  "| rewriting, ms |\n|---|---|---|---|---|---|---|")  # fmt: skip
            for spec, context in contexts.items():
                speed, base = (length / median(seconds[s]) for s in (spec, "off"))
                context.forget(length)
                planning = parts(context, steps)
                context.clear()
                calls = -(-length // args.ubatch)
                call = {kind: value / calls for kind, value in parts(context, [prompt]).items()}
                print(
                    f"| {spec} | {left[spec]:.1%} | {speed:.1f} | {speed / base:.2f} "
                    f"| {1000 * median(stepping[spec]):.2f} "
                    f"| {call[PLANNING]:.3f} / {planning[PLANNING]:.3f} "
                    f"| {call[REWRITING]:.3f} / {planning[REWRITING]:.3f} |",
                    flush=True,
                )
            stack.pop_all().close()


if __name__ == "__main__":
    main()
