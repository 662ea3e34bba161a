"""Counts the answers that token pruning loses, by kind of prompt, and what it costs in likelihood.

    python benchmarks/prune_tasks.py MODEL.gguf --prose TEXT [--tokens 400 800] [--count 20] [--seed 1000]
        [--kinds needle,facts] --settings "10:0.6;score=recent;keep=64;reach=2" file [--ubatch 2048] [--json OUT]

Each prompt is read in one call with each setting of AGQ_PRUNE, and without pruning. Then the given first words of the
reply and the answer are read. An answer is right if each of its tokens is the likeliest one. Kinds:

    needle, facts, functions  as calibration plants them (agq_gguf/pruning/planted.py)
    count           how many items a numbered list has
    list            a list that is to be told again
    variables       x1 = 83, x2 = x1, x3 = x2: the value of x3
    question-first  a needle whose question comes before the text
    paraphrase      a question that shares no content word with the fact
    second          a second question about another of six facts, after the first answer
    text            prose; the likelihood of the 64 tokens that follow

A line is printed for each prompt and setting, and the table in the end. With --json the results are kept in a file; a
run that was interrupted goes on from it, and more settings, kinds or seeds are added to it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from prune_kinds import ALL_KINDS, FOLLOWING, Task, Tasks

import agq_gguf
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.logits import log_softmax
from agq_gguf.pruning.plan import STAYED, Work, work_of
from agq_gguf.runtime.log import why_not_pruned
from agq_gguf.runtime.model import Batch, Context, Model
from agq_gguf.text import read_text

OFF = "off"
_AFTER = 256  # room in the context for replies, answers and a second question


@dataclass(frozen=True)
class Result:
    """One prompt with one setting."""

    kind: str
    seed: int
    setting: str
    tokens: int  # of the prompt
    right: bool
    nll: float  # mean over the tokens of the answer, or of the text that follows
    kept: float | None  # share of the tokens that the answer depends on; None for prose
    saved: float  # share of the prompt's work


class Results:
    """All results, in a file if there is one."""

    def __init__(self, path: Path | None, about: dict[str, object]) -> None:
        """Raises SystemExit if the file is of another run; `about` says what must be the same."""
        self._path, self._about = path, about
        self.found: dict[tuple[str, int, str], Result] = {}
        if path and path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["about"] != about:
                raise SystemExit(f"{path}: has results of another run ({known['about']}), expected {about}")
            for entry in known["results"]:
                self._keep(Result(**entry))

    def add(self, result: Result) -> None:
        """Keeps a result, and writes the file."""
        self._keep(result)
        if self._path:
            text = json.dumps(
                {"about": self._about, "results": [asdict(found) for found in self.found.values()]}, indent=0
            )
            new = self._path.with_name(self._path.name + ".new")
            new.write_text(text, encoding="utf-8")
            new.replace(self._path)

    def _keep(self, result: Result) -> None:
        self.found[result.kind, result.seed, result.setting] = result


def measure(context: Context, task: Task, work: Work) -> tuple[bool, float, float | None, float]:
    """`right`, `nll`, `kept` and `saved` of a task."""
    context.clear()
    batch = Batch(task.prompt)
    context.decode(batch)
    left = np.full(len(task.prompt), STAYED, np.int32)
    layers = agq_gguf.last_pruned()
    left[: len(layers)] = layers
    n_past, logits = len(task.prompt), context.logits(batch)[-1:].copy()
    *earlier, last = task.read or (np.empty(0, np.int32),)
    for tokens in earlier:
        context.decode(Batch(tokens, first_position=n_past))
        n_past += len(tokens)
    following = np.concatenate([last, task.answer[:-1]])
    if len(following):
        # The token before the answer predicts its first token; that may be the prompt's last one.
        batch = Batch(following, first_position=n_past, first_logits=max(len(last) - 1, 0))
        context.decode(batch)
        logits = np.concatenate([logits if not len(last) else logits[:0], context.logits(batch)])
    found = log_softmax(logits)
    nll = -found[np.arange(len(task.answer)), task.answer].mean()
    kept = float((left[list(task.value)] == STAYED).mean()) if task.value else None
    return bool((found.argmax(1) == task.answer).all()), float(nll), kept, work.saving([left])


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson; all of 0 to 1 for nothing."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, right / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(middle - width, 0.0) / (1 + z * z / n), min((middle + width) / (1 + z * z / n), 1.0)


def table(results: Results, settings: Sequence[str], kinds: Sequence[str], seeds: Sequence[int]) -> None:
    """Prints a row for each setting and kind, and for all kinds together."""
    columns = ("setting", "kind", "right unpruned", "right of those", "95%", "value kept", "work saved", "NLL")
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    answers = [kind for kind in kinds if kind != "text"]
    groups = {kind: [kind] for kind in kinds} | ({"all with answers": answers} if len(answers) > 1 else {})
    for setting in settings:
        for name, group in groups.items():
            pairs = [(results.found[kind, seed, setting], results.found[kind, seed, OFF])
                     for kind in group for seed in seeds]  # fmt: skip
            nll, before = (float(np.mean([pair[i].nll for pair in pairs])) for i in (0, 1))
            saved = f"{np.mean([one.saved for one, _ in pairs]):.1%}"
            if name == "text":
                row = ["", "", "", "", saved, f"{nll:.3f} ({nll / before - 1:+.1%})"]
            else:
                right = [one.right for one, off in pairs if off.right]
                low, high = wilson(sum(right), len(right))
                kept = np.mean([one.kept for one, _ in pairs if one.kept is not None])
                row = [f"{len(right)}/{len(pairs)}", f"{sum(right)}/{len(right)}", f"{low:.0%} to {high:.0%}",
                       f"{kept:.1%}", saved, f"{nll:.3f}"]  # fmt: skip
            print(f"| `{setting}` | {name} | " + " | ".join(row) + " |")


def main() -> None:
    """Reads the arguments, runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prose", type=Path, required=True, help="text whose sentences surround the facts")
    parser.add_argument("--tokens", type=int, nargs=2, default=(400, 800), help="length of the prompts")
    parser.add_argument("--count", type=int, default=20, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=1000, help="of the first prompt")
    parser.add_argument("--kinds", default=",".join(ALL_KINDS), help="separated by commas")
    parser.add_argument("--settings", nargs="+", default=["file"], help="values of AGQ_PRUNE")
    parser.add_argument("--ubatch", type=int, default=2048, help="raised to the length of the prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT", help="keep the results in this file")
    args = parser.parse_args()
    kinds, tokens = args.kinds.split(","), (args.tokens[0], args.tokens[1])
    if unknown := sorted(set(kinds) - set(ALL_KINDS)):
        parser.error(f"kinds must be from {', '.join(ALL_KINDS)}, got {', '.join(unknown)}")
    settings = list(dict.fromkeys([OFF, *args.settings]))
    seeds = range(args.seed, args.seed + args.count)
    ubatch = max(args.ubatch, tokens[1])
    about = {"model": args.model.name, "prose": args.prose.name, "tokens": list(tokens)}
    results = Results(args.json, about)
    info = inspect_file(args.model).pruning
    with open_model(args.model) as reader:
        sizes = {name: tensor.n_elements for name, tensor in reader.tensors.items()}
    with Model(args.model) as model:
        tasks = Tasks(model, read_text(args.prose), tokens)
        for kind in kinds:
            for setting in settings:
                missing = [seed for seed in seeds if (kind, seed, setting) not in results.found]
                if not missing:
                    continue
                spec = info.curve[0].spec if setting == "file" and info and info.curve else setting
                work = work_of(sizes, "reuse=1" in spec)
                size = tokens[1] + max(_AFTER, FOLLOWING)
                with agq_gguf.options(prune=setting), model.context(
                    size, n_batch=max(size, ubatch), n_ubatch=ubatch, threads=args.threads
                ) as context:  # fmt: skip
                    for seed in missing:
                        task = tasks.task(kind, seed)
                        right, nll, kept, saved = measure(context, task, work)
                        results.add(Result(kind, seed, setting, len(task.prompt), right, nll, kept, saved))
                        verdict = "" if kept is None else f"{'right' if right else 'wrong'}  kept {kept:.0%}  "
                        print(f"{kind} {seed}: {len(task.prompt)} tokens  {verdict}NLL {nll:.3f}  "
                              f"saved {saved:.1%}  {setting}", flush=True)  # fmt: skip
                        if setting != OFF and not saved:
                            print(f"  nothing was pruned: {why_not_pruned() or 'no token was below the threshold'}")
    table(results, settings, kinds, seeds)


if __name__ == "__main__":
    main()
