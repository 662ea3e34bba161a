"""Measures the quality cost of token pruning in the running library: text after long prompts, and recalled facts.

    python benchmarks/prune_figures.py MODEL --text held-out.txt [--spec SPEC ...]
    python benchmarks/prune_figures.py MODEL --recall 77

MODEL is an AGQ4 model with pruning (``agq-gguf calibrate-pruning``). Its own setting is compared with others that save
the same work: random pruning and the paper's score after the same layers, with and without reuse of states, and
leaving out the oldest tokens of the prompt. It is also compared with no pruning. --recall is for the story model;
prune_tasks.py asks chat models. This program made most tables of docs/research/pruning.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import agq_gguf
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.logits import log_softmax
from agq_gguf.pruning.plan import STAYED, Work, work_of
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.text import read_text

FOLLOWING = 64
ANSWER = 24  # maximum number of tokens


@dataclass
class Task:
    """A prompt, and what is measured after it."""

    tokens: NDArray[np.int32]
    following: NDArray[np.int32] | None = None  # tokens whose NLL is measured
    recall: object = None  # decides whether a reply is right


@dataclass
class Works:
    """The work of tokens: if states of dropped tokens are not reused, if they are, and with the file's setting."""

    gone: Work
    again: Work
    file: Work

    def of(self, spec: str) -> Work:
        """The work for a setting."""
        return self.file if spec == "file" else self.again if "reuse=1" in spec else self.gone


@dataclass
class Result:
    """Results of one setting, by task."""

    nll: list[float]
    right: list[bool]
    saved: list[float]


def leave_out_oldest(tokens: NDArray[np.int32], share: float) -> NDArray[np.int32]:
    """A prompt without its oldest tokens, except the first one, which is kept."""
    return np.concatenate([tokens[:1], tokens[1 + round(share * len(tokens)) :]])


def read(context: Context, tokens: NDArray[np.int32], work: Work) -> tuple[NDArray[np.float32], float]:
    """Logits after a prompt, and the share of its work that was saved."""
    context.clear()
    batch = Batch(tokens)
    context.decode(batch)
    left = np.full(len(tokens), STAYED, np.int32)
    layers = agq_gguf.last_pruned()
    left[: len(layers)] = layers
    return context.logits(batch)[-1].copy(), work.saving([left])


def go_on(model: Model, context: Context, logits: NDArray[np.float32], n_past: int, end: int) -> str:
    """The text of greedy decoding, up to the end token."""
    answer = []
    for i in range(ANSWER):
        token = int(logits.argmax())
        if token == end:
            break
        answer.append(token)
        batch = Batch([token], first_position=n_past + i)
        context.decode(batch)
        logits = context.logits(batch)[-1]
    return model.detokenize(answer)


def behind(
    context: Context, logits: NDArray[np.float32], n_past: int, tokens: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Log-probabilities [tokens, vocabulary] of tokens after a prompt whose last logits are `logits`."""
    if len(tokens) == 1:
        return log_softmax(logits[None])
    batch = Batch(tokens[:-1], first_position=n_past, first_logits=0)
    context.decode(batch)
    return log_softmax(np.concatenate([logits[None], context.logits(batch)]))


def measure(
    model: Model, spec: str, tasks: Sequence[Task], work: Works, args: argparse.Namespace, oldest: float = 0.0
) -> Result:
    """Runs all tasks with one setting."""
    result = Result([], [], [])
    size = max(len(task.tokens) for task in tasks) + FOLLOWING
    with agq_gguf.options(prune=spec), model.context(size, n_ubatch=args.ubatch, threads=args.threads) as context:
        for task in tasks:
            tokens = leave_out_oldest(task.tokens, oldest) if oldest else task.tokens
            logits, saved = read(context, tokens, work.of(spec))
            result.saved.append(1 - (1 - saved) * len(tokens) / len(task.tokens))
            if task.following is not None:
                found = behind(context, logits, len(tokens), task.following)
                result.nll.append(float(-found[np.arange(len(task.following)), task.following].mean()))
            else:
                reply = go_on(model, context, logits, len(tokens), model.eos)
                result.right.append(task.recall.right(reply))  # type: ignore[attr-defined]
    return result


def text_tasks(model: Model, path: Path, length: int, count: int) -> list[Task]:
    """Prompts spread over a text, and the tokens that follow each."""
    tokens = model.tokenize(read_text(path))
    starts = np.linspace(0, len(tokens) - length - FOLLOWING, count).astype(int)
    tasks = [Task(tokens[s : s + length].copy(), tokens[s + length : s + length + FOLLOWING]) for s in starts]
    for task in tasks:
        task.tokens[0] = model.bos if model.add_bos else task.tokens[0]
    return tasks


def main() -> None:
    """Reads the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="text for prompts and continuations")
    parser.add_argument("--recall", type=int, metavar="SEED", help="seed for the tasks of recall_task.py")
    parser.add_argument("--count", type=int, default=200, help="number of prompts of each kind")
    parser.add_argument("--length", type=int, default=700, help="tokens of a prompt from --text")
    parser.add_argument("--tokens", type=int, nargs=2, default=(300, 500), help="length of prompts that ask for facts")
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spec", action="append", default=[], help="further settings")
    args = parser.parse_args()
    info = inspect_file(args.model).pruning
    with open_model(args.model) as reader:
        sizes = {name: tensor.n_elements for name, tensor in reader.tensors.items()}
    reuse = "reuse=1" in info.curve[0].spec if info else False
    work = Works(*(work_of(sizes, how) for how in (False, True, reuse)))
    with Model(args.model) as model:
        kinds: dict[str, list[Task]] = {}
        if args.text:
            kinds["text"] = text_tasks(model, args.text, args.length, args.count)
        if args.recall is not None:
            from recall_task import recall_tasks

            def tokenize(prompt: str) -> NDArray[np.int32]:
                return model.tokenize(prompt, parse_special=True)

            recalls = recall_tasks(args.recall, args.count, tuple(args.tokens), lambda prompt: len(tokenize(prompt)))
            kinds["recall"] = [Task(tokenize(t.prompt), recall=t) for t in recalls]
        for kind, tasks in kinds.items():
            print(f"\n{kind}: {len(tasks)} prompts of {min(len(t.tokens) for t in tasks)} to "
                  f"{max(len(t.tokens) for t in tasks)} tokens, calls of {args.ubatch}")  # fmt: skip
            print("| setting | work saved | NLL | right |\n|---|---|---|---|")
            base = measure(model, "off", tasks, work, args)
            show("no pruning", base, base)
            own = measure(model, "file", tasks, work, args)
            saved = float(np.mean(own.saved))
            show("as calibrated (file)", own, base)
            layers = inspect_layers(info)
            for score in ("random", "first"):
                for again in (False, True) if reuse else (False,):
                    spec = same_saving(layers, saved, work.again if again else work.gone, score)
                    spec += ";keep=64;reuse=1" if again else ""
                    name = f"{score}, same layers, {'states reused' if again else 'states not reused'}"
                    show(name, measure(model, spec, tasks, work, args), base)
            show("oldest left out", measure(model, "off", tasks, work, args, oldest=saved), base)
            for spec in args.spec:
                show(spec, measure(model, spec, tasks, work, args), base)


def inspect_layers(info: object) -> list[int]:
    """The pruning layers of the file."""
    spec = info.curve[0].spec  # type: ignore[attr-defined]
    return [int(rule.split(":")[0]) for rule in spec.split(";")[0].split(",")]


def same_saving(layers: list[int], saving: float, work: Work, score: str) -> str:
    """A setting that drops shares of tokens after these layers, with an equal part of the saving at each."""
    rules, there = [], 1.0
    for layer in layers:
        leave = saving / len(layers) / work.worth(layer)
        rules.append(f"{layer}:{leave / there:.4f}")
        there -= leave
    return ",".join(rules) + f";score={score}"


def show(name: str, found: Result, base: Result) -> None:
    """Prints one row; each difference from no pruning has its standard error over tasks."""
    nll = right = ""
    if found.nll:
        change = np.array(found.nll) - np.array(base.nll)
        whole = np.mean(base.nll)
        nll = f"{np.mean(found.nll):.4f} ({change.mean() / whole:+.2%} +- {_error(change) / whole:.2%})"
    if found.right:
        points = 100.0 * (np.array(found.right, float) - np.array(base.right, float))
        right = f"{np.mean(found.right):.1%} ({points.mean():+.1f} +- {_error(points):.1f} points)"
    print(f"| {name} | {np.mean(found.saved):.1%} | {nll} | {right} |", flush=True)


def _error(values: NDArray[np.float64]) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    main()
