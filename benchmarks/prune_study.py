"""Compares scores for dropping tokens of a prompt, on a trained LLaMA in PyTorch.

Tokens are removed after the pruning layers, as in the plugin. Three things are measured for the text after a prompt:
its negative log-likelihood (NLL), the KL divergence from the model without pruning, and whether facts of the prompt are
still answered. Scores that the plugin does not have can be tried, too. These commands made the tables of
docs/research/pruning.md:

    python benchmarks/prune_study.py scores MODEL --plan 2:0.4 [--recall SEED] [--text TEXT]
    python benchmarks/prune_study.py outliers MODEL --plan 2:0.4 --text TEXT

Nothing here is used at run time.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SHORTEST = 64  # tokens; shorter calls are not pruned
QUERIES = 8  # number of last tokens of the prompt, for `recent`
WINDOW = 64  # the same for `window`
FOLLOWING = 64  # tokens after a prompt that are scored


# scores: from the attention of a layer between the T tokens of a call to their importance [T]


@dataclass(frozen=True)
class Seen:
    """Attention of the tokens of a call."""

    own: Tensor  # [heads, T, T]: attention of each token to each token of the same call
    start: Tensor  # [heads, T]: attention of each token to the first token of the sequence
    visible: Tensor  # [T, 1]: how many tokens each can attend to, including those of earlier calls

    def tail(self, n: int) -> Tensor:
        """Attention of the last n tokens, as a multiple of even attention, [heads, n, T]."""
        return (self.own * self.visible)[:, -n:]

    @property
    def share(self) -> Tensor:
        """Attention that each token would receive from all later ones if they spread it evenly, [T]."""
        return (torch.ones_like(self.own[0]).tril(-1) / self.visible).sum(0).clamp(min=1e-9)


def first(seen: Seen) -> Tensor:
    """The attention of a token to the first token: the paper's score."""
    return seen.start.mean(0)


def received(seen: Seen) -> Tensor:
    """The attention of later tokens to a token, as a multiple of even attention."""
    return seen.own.mean(0).tril(-1).sum(0) / seen.share


def received_max(seen: Seen) -> Tensor:
    """`received`, from the head with the most attention."""
    return (seen.own.tril(-1).sum(1) / seen.share).amax(0)


def recent(seen: Seen) -> Tensor:
    """The attention of the last 8 tokens to a token."""
    return seen.tail(QUERIES).mean((0, 1))


def window(seen: Seen) -> Tensor:
    """The attention of the last 64 tokens to a token."""
    return seen.tail(WINDOW).mean((0, 1))


def recent_max(seen: Seen) -> Tensor:
    """The attention of the last 8 tokens to a token, in the head with the most attention."""
    return seen.tail(QUERIES).mean(1).amax(0)


def strongest(seen: Seen) -> Tensor:
    """The largest attention of any of the last 8 tokens in any head."""
    return seen.tail(QUERIES).amax((0, 1))


def both(seen: Seen) -> Tensor:
    """`received` or `recent`, whichever is larger."""
    return torch.maximum(received(seen), recent(seen))


def random(seen: Seen) -> Tensor:
    """A random score."""
    return torch.rand(seen.own.shape[1], generator=torch.Generator().manual_seed(seen.own.shape[1]))


def oldest(seen: Seen) -> Tensor:
    """The position: the oldest tokens are dropped first."""
    return torch.arange(seen.own.shape[1]).float()


SCORES: dict[str, Callable[[Seen], Tensor]] = {
    **{f.__name__: f for f in (first, received, recent, window, both, random, oldest)},
    **{f.__name__: f for f in (recent_max, received_max, strongest)},
    "notfirst": lambda seen: -first(seen),
}


@dataclass(frozen=True)
class Plan:
    """The shares of tokens to drop, by layer, and the rules to choose them."""

    shares: dict[int, float] = field(default_factory=dict)
    score: str = "recent"
    layers: int = 1  # the score is the mean over so many layers, up to the pruning layer
    reach: int = 0  # each token gets the highest score within N places
    mean: int = 0  # each token gets the mean score within N places
    keep: int = QUERIES  # the last tokens of a call that are never dropped
    keep_rare: float = 0.0  # share of the prompt, the rarest tokens, that is never dropped
    ubatch: int = 1 << 30  # tokens of a call
    reuse: bool = False  # later layers get keys and values of dropped tokens, from the state when they were dropped


@dataclass
class _State:
    """One sequence: keys and values of each layer, [heads, cells, size]."""

    keys: list[Tensor]
    values: list[Tensor]
    n_past: int = 0
    read: int = 0  # number of prompt tokens read
    done: float = 0.0  # work done for them, in tokens times layers


class TorchLlama:
    """A dense GGUF of architecture ``llama`` in f32; its weights are dequantized."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.weights = {
            t.name.removesuffix(".weight"): torch.from_numpy(
                gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
            )
            for t in reader.tensors
        }

        def value(key: str, default: float = 0.0) -> float:
            found = reader.get_field(f"llama.{key}")
            return default if found is None else float(found.contents())

        self.n_layer, self.n_head = int(value("block_count")), int(value("attention.head_count"))
        self.n_kv = int(value("attention.head_count_kv", self.n_head))
        self.eps, self.base = value("attention.layer_norm_rms_epsilon"), value("rope.freq_base", 10000.0)
        self.weights.setdefault("output", self.weights["token_embd"])
        block = [(name, w.numel()) for name, w in self.weights.items() if name.startswith("blk.0.")]
        # Share of a layer's work after its attention.
        self.ffn_share = sum(n for name, n in block if "ffn" in name) / sum(n for _, n in block)
        self.rarity: Tensor | None = None  # by token; larger means rarer
        self.tap: Callable[[str, Tensor], None] | None = None  # called with the input of each matrix product

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Product with the transposed weight."""
        if self.tap is not None:
            self.tap(name, x)
        return x @ self.weights[name].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm."""
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weights[name]

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates neighbouring pairs; x: [T, heads, size]."""
        frequency = self.base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        turn = torch.polar(torch.tensor(1.0), positions[:, None].float() * frequency)[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def _keys_values(self, h: Tensor, block: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(h), self.n_kv, -1)
        k = self.rope(self.linear(h, f"{block}.attn_k").view(shape), positions)
        return k.transpose(0, 1), self.linear(h, f"{block}.attn_v").view(shape).transpose(0, 1)

    def _attend(
        self, h: Tensor, block: str, positions: Tensor, k: Tensor, v: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output and attention weights; `hidden` [T, cells] marks the cells that a token cannot attend to."""
        q = self.rope(self.linear(h, f"{block}.attn_q").view(len(h), self.n_head, -1), positions).transpose(0, 1)
        repeat = self.n_head // self.n_kv
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.linear((weights @ v).transpose(0, 1).reshape(len(h), -1), f"{block}.attn_output"), weights

    def _ffn(self, x: Tensor, block: str) -> Tensor:
        h = self.norm(x, f"{block}.ffn_norm")
        hidden = functional.silu(self.linear(h, f"{block}.ffn_gate")) * self.linear(h, f"{block}.ffn_up")
        return self.linear(hidden, f"{block}.ffn_down")

    def prompt(self, tokens: Tensor, plan: Plan) -> tuple[Tensor, _State]:
        """Logits [vocabulary] after the prompt, which is read in calls, and the state to continue from."""
        empty = torch.empty(self.n_kv, 0, self.weights["blk.0.attn_q"].shape[0] // self.n_head)
        state = _State([empty] * self.n_layer, [empty] * self.n_layer)
        for part in tokens.split(plan.ubatch):
            logits = self.call(part, state, plan)
        state.read = len(tokens)
        return logits[-1], state

    def call(self, tokens: Tensor, state: _State, plan: Plan) -> Tensor:
        """Logits of the tokens that were not dropped; extends the state."""
        x, positions = self.weights["token_embd"][tokens], torch.arange(len(tokens))  # within this call
        left, gone = positions[:0], x[:0]  # dropped tokens, and their states when they were dropped
        history = torch.zeros(0, len(tokens))
        for i in range(self.n_layer):
            block = f"blk.{i}"
            h = self.norm(x, f"{block}.attn_norm")
            cells = positions
            k, v = self._keys_values(h, block, state.n_past + positions)
            if plan.reuse and len(left):
                old = self._keys_values(self.norm(gone, f"{block}.attn_norm"), block, state.n_past + left)
                k, v, cells = torch.cat([k, old[0]], 1), torch.cat([v, old[1]], 1), torch.cat([positions, left])
            before = state.keys[i].shape[1]
            state.keys[i], state.values[i] = torch.cat([state.keys[i], k], 1), torch.cat([state.values[i], v], 1)
            hidden = functional.pad(positions[:, None] < cells[None, :], (before, 0))
            mixed, weights = self._attend(h, block, state.n_past + positions, state.keys[i], state.values[i], hidden)
            x = x + mixed
            state.done += len(x) * (1 - self.ffn_share)
            if plan.shares and len(tokens) >= SHORTEST:
                own = weights[:, :, before : before + len(positions)]
                seen = Seen(own, weights[:, :, 0], (~hidden).sum(1, keepdim=True))
                row = torch.zeros(1, len(tokens))
                row[0, positions] = SCORES[plan.score](seen)
                history = torch.cat([history, row])
                if i in plan.shares:
                    rows = history[-plan.layers :, positions].mean(0)
                    keep = self._choose(rows, positions, tokens, plan, i, state.n_past)
                    gone, left = torch.cat([gone, x[~keep]]), torch.cat([left, positions[~keep]])
                    x, positions = x[keep], positions[keep]
            state.done += len(x) * self.ffn_share
            x = x + self._ffn(x, block)
        state.n_past += len(tokens)
        return self.linear(self.norm(x, "output_norm"), "output")

    def _choose(
        self, importance: Tensor, positions: Tensor, tokens: Tensor, plan: Plan, layer: int, n_past: int
    ) -> Tensor:
        """Which of the remaining tokens are kept, bool: drops a share of them, the least important ones."""
        importance = functional.max_pool1d(importance[None, None], 2 * plan.reach + 1, 1, plan.reach)[0, 0]
        importance = functional.avg_pool1d(importance[None, None], 2 * plan.mean + 1, 1, plan.mean)[0, 0]
        n = len(importance)
        if plan.keep_rare and self.rarity is not None:
            importance[self.rarity[tokens[positions]].topk(int(plan.keep_rare * n)).indices] = torch.inf
        importance[positions >= len(tokens) - max(1, plan.keep)] = torch.inf
        if n_past == 0:
            importance[0] = torch.inf
        keep = torch.ones(n, dtype=torch.bool)
        keep[importance.argsort(stable=True)[: int(plan.shares[layer] * n + 0.5)]] = False
        return keep | importance.isinf()


# measuring


@dataclass(frozen=True)
class Example:
    """A prompt and the tokens that follow it."""

    prompt: Tensor
    following: Tensor


def log_probabilities(model: TorchLlama, example: Example, plan: Plan) -> tuple[Tensor, float]:
    """Log-probabilities [following, vocabulary] of the tokens that follow, and the share of the prompt's work saved."""
    last, state = model.prompt(example.prompt, plan)
    saved = 1 - state.done / (state.read * model.n_layer)
    rest = model.call(example.following[:-1], state, Plan()) if len(example.following) > 1 else last[None][:0]
    return torch.cat([last[None], rest]).log_softmax(-1), saved


@dataclass
class Outcome:
    """Means over examples."""

    nll: float
    kl: float
    right: float  # share of examples in which greedy decoding gives all the tokens that follow
    saved: float


def measure(model: TorchLlama, examples: list[Example], plan: Plan, full: list[Tensor]) -> Outcome:
    """Runs a plan; `full`: log-probabilities of the unpruned model."""
    nll, kl, right, saved = [], [], [], []
    for example, reference in zip(examples, full, strict=True):
        found, share = log_probabilities(model, example, plan)
        nll.append(-found.gather(1, example.following[:, None]).mean())
        kl.append((reference.exp() * (reference - found)).sum(-1).mean())
        right.append(bool((found.argmax(-1) == example.following).all()))
        saved.append(share)
    return Outcome(*(float(np.mean(values)) for values in (nll, kl, right, saved)))


def tokenizer_of(path: Path) -> Callable[[str, bool], Tensor]:
    """The model's own tokenizer; it adds no special tokens but parses those written in the text."""
    from agq_gguf.runtime.model import Model

    model = Model(path, vocab_only=True)
    return lambda text, bos: torch.from_numpy(
        model.tokenize(text, add_special=bos, parse_special=True).astype(np.int64)
    )


def text_examples(tokens: Tensor, length: int, count: int) -> list[Example]:
    """Prompts of `length` tokens spread over a text, and the 64 tokens after each."""
    starts = np.linspace(0, len(tokens) - length - FOLLOWING, count).astype(int)
    return [Example(tokens[s : s + length], tokens[s + length : s + length + FOLLOWING]) for s in starts]


def recall_examples(
    seed: int, tokenize: Callable[[str, bool], Tensor], count: int, tokens: tuple[int, int]
) -> list[Example]:
    """Prompts that end with a question, and the answers."""
    from recall_task import recall_tasks

    tasks = recall_tasks(seed, count, tokens, lambda prompt: len(tokenize(prompt, True)))
    return [Example(tokenize(t.prompt, True), tokenize(f" {t.answer}", False)) for t in tasks]


# Variants, in the form that parse_variant reads.
VARIANTS = """
first first+keep64 first+reach2+keep64 notfirst+keep64 oldest random random+keep64 random+reach2+keep64 received recent
received+keep64 recent+keep64 window+keep64 both+keep64 recent_max+keep64 received_max+keep64 strongest+keep64
received+reach2+keep64 recent+reach1+keep64 recent+reach2+keep64 recent+reach4+keep64 recent+reach8+keep64
recent+mean2+keep64 recent_max+reach2+keep64 strongest+reach2+keep64 window+reach2+keep64 both+reach2+keep64
recent+keep32 recent+keep128 recent+layers2+keep64 recent+layers99+keep64 received+layers99+keep64
recent+rare0.1+keep64 received+rare0.1+keep64 random+reuse+keep64 received+reuse+keep64 recent+reuse+keep64
"""


def parse_variant(text: str, plan: Plan) -> Plan:
    """Parses ``recent+reach2+keep64``: a score, and values for fields of `Plan`."""
    score, *changes = text.split("+")
    plan = replace(plan, score=score)
    for change in changes:
        found = re.fullmatch(r"([a-z]+)([\d.]*)", change)
        if not found:
            raise SystemExit(f"expected a name and a number, got {change!r}")
        name, number = found.groups()
        field_name = {"rare": "keep_rare"}.get(name, name)
        value: Any = {"reuse": bool, "rare": float}.get(name, int)(number or 1)
        plan = replace(plan, **{field_name: value})
    return plan


def sets(args: argparse.Namespace, model: TorchLlama) -> Iterator[tuple[str, list[Example]]]:
    """The requested sets of examples."""
    tokenize = tokenizer_of(args.model)
    if args.text:
        tokens = tokenize(args.text.read_text(encoding="utf-8"), True)
        counts = torch.bincount(tokens, minlength=len(model.weights["token_embd"]))
        model.rarity = -counts.float()
        yield "text", text_examples(tokens, args.length, args.count)
    if args.recall:
        yield "recall", recall_examples(args.recall, tokenize, args.count, tuple(args.tokens))


def scores(args: argparse.Namespace) -> None:
    """Prints a table of every variant on every set of examples."""
    model, plan = TorchLlama(args.model), parse_plan(args.plan, args.ubatch)
    for name, examples in sets(args, model):
        full = [log_probabilities(model, e, Plan())[0] for e in examples]
        base = measure(model, examples, Plan(), full)
        lengths = [len(e.prompt) for e in examples]
        prompts = f"{len(examples)} prompts of {min(lengths)}..{max(lengths)} tokens"
        print(f"\n{name}: {prompts}, {args.plan}, calls of {args.ubatch}")
        print(f"| unpruned | NLL {base.nll:.4f} | | right {base.right:.1%} | |\n|---|---|---|---|---|")
        for variant in args.only or VARIANTS.split():
            begun = time.monotonic()
            found = measure(model, examples, parse_variant(variant, plan), full)
            print(
                f"| {variant} | {found.nll / base.nll - 1:+.2%} | KL {found.kl:.5f} | {found.right:.1%} "
                f"| saved {found.saved:.1%} |  <!-- {time.monotonic() - begun:.0f} s -->",
                flush=True,
            )


def outliers(args: argparse.Namespace) -> None:
    """Prints the largest input of each matrix product over its root mean square, after the first pruning layer."""
    model, plan = TorchLlama(args.model), parse_plan(args.plan, args.ubatch)
    _, examples = next(sets(args, model))
    behind = min(plan.shares)
    kinds = ("attn_q", "attn_output", "ffn_gate", "ffn_down")
    print("largest / root mean square by token (mean), and the 8-bit rounding error |x - xq|^2 / |x|^2 (per mille)")
    print("| pruned by | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    for score in ("none", "first", "notfirst", "received", "recent", "random"):
        seen: dict[str, list[Tensor]] = {kind: [] for kind in kinds}

        def tap(name: str, x: Tensor, seen: dict[str, list[Tensor]] = seen) -> None:
            parts = name.split(".")
            if len(parts) == 3 and parts[2] in seen and int(parts[1]) > behind:
                seen[parts[2]].append(x)

        model.tap = tap
        for example in examples:
            model.prompt(example.prompt, Plan() if score == "none" else replace(plan, score=score))
        model.tap = None
        cells = []
        for kind in kinds:
            peak = torch.cat([x.abs().amax(1) / x.square().mean(1).sqrt() for x in seen[kind]])
            lost = torch.cat([rounding_loss(x) for x in seen[kind]])
            cells.append(f"{float(peak.mean()):.3f}, {1000 * float(lost.mean()):.4f}")
        print(f"| {score} | " + " | ".join(cells) + " |", flush=True)


def rounding_loss(x: Tensor) -> Tensor:
    """Relative error of each token from int8 rounding with one scale per token, [T]."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return ((x / scale).round() * scale - x).square().sum(1) / x.square().sum(1)


def parse_plan(text: str, ubatch: int) -> Plan:
    """Parses ``2:0.3,4:0.5`` into shares by layer."""
    parts = (part.split(":") for part in text.split(","))
    return Plan({int(layer): float(share) for layer, share in parts}, ubatch=ubatch)


def main() -> None:
    """Reads the arguments and runs the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scores", "outliers"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--plan", default="2:0.4", help="share dropped by layer, such as 1:0.2,3:0.4")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--recall", type=int, metavar="SEED", help="seed for the tasks of recall_task.py")
    parser.add_argument("--tokens", type=int, nargs=2, default=(300, 600), help="length of the prompts of --recall")
    parser.add_argument("--length", type=int, default=448, help="tokens of a prompt from --text")
    parser.add_argument("--ubatch", type=int, default=512, help="tokens per call")
    parser.add_argument("--count", type=int, default=24, help="number of prompts")
    parser.add_argument("--only", action="append", help="a variant, as the table names it; may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        {"scores": scores, "outliers": outliers}[args.what](args)


if __name__ == "__main__":
    main()
