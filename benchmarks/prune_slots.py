"""Measures whether token pruning gives users of one context what each would get alone.

    python benchmarks/prune_slots.py MODEL.gguf --prose TEXT [--slots 4] [--groups 8] [--tokens 400 800]
        [--settings file off] [--ubatch 512] [--split] [--seed 2000]

Each group has one prompt for each slot (needle, six facts, functions of code, prose). They are read in three ways:

    alone      each in a context of its own
    at once    all prompts in one batch, then single tokens of all slots side by side
    in turn    each batch has the prompt of one slot and single tokens of those before it, as in a server

After the prompt, each slot reads the answer, or the prose that follows. Per setting of AGQ_PRUNE and way it prints the
mean and the largest KL divergence of the next-token distributions to those of alone, and how many of them have another
likeliest token. The row "unpruned" compares alone with pruning to alone without. `--split` gives each slot a cache of
its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as api
import numpy as np
from numpy.typing import NDArray
from prune_kinds import Task, Tasks

import agq_gguf
from agq_gguf.logits import compare
from agq_gguf.runtime.log import why_not_pruned
from agq_gguf.runtime.model import Model
from agq_gguf.text import read_text

KINDS = ("needle", "facts", "functions", "text")
AFTER = 64  # room for the tokens that follow a prompt


@dataclass
class Piece:
    """Successive tokens of a slot; the last one's logits are wanted."""

    slot: int
    tokens: NDArray[np.int32]
    position: int


class Slots:
    """A context with several sequences; a context manager."""

    def __init__(self, model: Model, slots: int, size: int, *, setting: str, ubatch: int, split: bool) -> None:
        """`size`: tokens of a slot."""
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = size * slots, slots
        parameters.n_batch, parameters.n_ubatch = size * slots, ubatch
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.kv_unified = not split
        self._vocabulary = model.n_vocab
        with agq_gguf.options(prune=setting):
            self._context = api.llama_init_from_model(model.handle, parameters)
        if not self._context:
            raise SystemExit(f"{model.path}: llama.cpp cannot create a context of {size * slots} tokens")

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        api.llama_free(self._context)

    def decode(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        """The logits behind each piece."""
        n = sum(len(piece.tokens) for piece in pieces)
        batch = api.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        ends, i = [], 0
        for piece in pieces:
            for place, token in enumerate(piece.tokens):
                batch.token[i], batch.pos[i] = int(token), piece.position + place
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, piece.slot
                batch.logits[i] = place + 1 == len(piece.tokens)
                i += 1
            ends.append(i - 1)
        status = api.llama_decode(self._context, batch)
        api.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama.cpp cannot compute the batch: {status}")
        rows = [api.llama_get_logits_ith(self._context, end) for end in ends]
        return [np.ctypeslib.as_array(row, (self._vocabulary,)).copy() for row in rows]


def following(task: Task) -> NDArray[np.int32]:
    """What a slot reads after its prompt, one token at a time."""
    return np.concatenate([*task.read, task.answer])[:AFTER].astype(np.int32)


def in_turn(tasks: Sequence[Task], *, at_once: bool) -> list[list[Piece]]:
    """The batches of a group; a slot is as long as it has tokens to read."""
    arrival = [0 if at_once else slot for slot in range(len(tasks))]
    batches = []
    for step in range(max(a + len(following(t)) for a, t in zip(arrival, tasks, strict=True))):
        batch = []
        for slot, task in enumerate(tasks):
            read, turn = following(task), step - arrival[slot]
            if turn == 0:
                batch.append(Piece(slot, task.prompt, 0))
            elif 0 < turn < len(read):
                batch.append(Piece(slot, read[turn - 1 : turn], len(task.prompt) + turn - 1))
        batches.append(batch)
    return batches


def run(slots: Slots, batches: Sequence[Sequence[Piece]], n: int) -> list[NDArray[np.float32]]:
    """The logits of each slot."""
    found: list[list[NDArray[np.float32]]] = [[] for _ in range(n)]
    for batch in batches:
        if batch:
            for piece, row in zip(batch, slots.decode(batch), strict=True):
                found[piece.slot].append(row)
    return [np.array(rows) for rows in found]


def main() -> None:
    """Reads the arguments, runs all groups and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prose", type=Path, required=True, help="text whose sentences surround the facts")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8, help="how many times all slots get prompts")
    parser.add_argument("--tokens", type=int, nargs=2, default=(400, 800), help="length of the prompts")
    parser.add_argument("--settings", nargs="+", default=["file", "off"], help="values of AGQ_PRUNE")
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--split", action="store_true", help="a cache for each slot")
    parser.add_argument("--seed", type=int, default=2000, help="of the first prompt")
    args = parser.parse_args()
    size = args.tokens[1] + AFTER
    parts: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    dropped: list[float] = []
    with Model(args.model) as model:
        maker = Tasks(model, read_text(args.prose), (args.tokens[0], args.tokens[1]))
        for group in range(args.groups):
            seeds = range(args.seed + group * args.slots, args.seed + (group + 1) * args.slots)
            tasks = [maker.task(KINDS[seed % len(KINDS)], seed) for seed in seeds]
            targets = [following(task) for task in tasks]
            unpruned: list[NDArray[np.float32]] = []
            for setting in dict.fromkeys(["off", *args.settings]):
                how = {"setting": setting, "ubatch": args.ubatch, "split": args.split}
                alone = []
                for task in tasks:
                    with Slots(model, 1, size, **how) as one:
                        first, *rest = in_turn([task], at_once=True)
                        rows = run(one, [first], 1)[0]
                        if setting != "off":
                            layers = agq_gguf.last_pruned()
                            dropped.append(float(np.mean([layer >= 0 for layer in layers])))
                        alone.append(np.concatenate([rows, run(one, rest, 1)[0]]))
                unpruned = unpruned or alone
                ways = {"unpruned": unpruned}
                for name, at_once in (("at once", True), ("in turn", False)):
                    with Slots(model, args.slots, size, **how) as all_slots:
                        ways[name] = run(all_slots, in_turn(tasks, at_once=at_once), args.slots)
                for name, logits in ways.items():
                    rows_of = [compare(a, b, t) for a, b, t in zip(alone, logits, targets, strict=True)]
                    parts.setdefault((setting, name), []).extend(rows_of)
            print(f"group {group + 1} of {args.groups}", flush=True)
            if reason := why_not_pruned():
                print(f"  {reason}")
    print(f"\n{np.mean(dropped):.1%} of the tokens of a prompt are dropped on average\n" if dropped else "")
    print(
        "| setting | compared with alone | mean KL | largest KL of an answer | another likeliest token |\n|"
        + "---|" * 5
    )
    for (setting, name), found in parts.items():
        kl, same = np.concatenate(found)[:, 2], np.concatenate(found)[:, 3]
        worst = max(float(part[:, 2].mean()) for part in found)
        print(f"| `{setting}` | {name} | {kl.mean():.6f} | {worst:.6f} | {int((same == 0).sum())} of {len(same)} |")


if __name__ == "__main__":
    main()
