"""Which tokens of a prompt can leave: ways to score them, compared on a trained LLaMA in PyTorch.

Tokens are physically removed behind the pruning layers, as the plugin does it. What follows a prompt is measured: its
negative log-likelihood (NLL), the KL divergence to the model that keeps everything, and whether facts of the prompt are
still answered. Ways that the plugin does not know can be tried, too. The tables of docs/pruning.md come from

    python benchmarks/prune_study.py scores MODEL --plan 2:0.4 [--recall EXAMPLES.jsonl] [--text TEXT]
    python benchmarks/prune_study.py outliers MODEL --plan 2:0.4 --text TEXT

EXAMPLES has one JSON object a line: {"prompt": text, "answer": text}. Nothing here is used at run time.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

QUERIES = 8  # the last ones of the prompt, for `recent`
WINDOW = 64  # the same for `window`
FOLLOWING = 64  # tokens behind a prompt that are scored


# ways to score: attention weights of one layer [heads, T, T] -> importance [T]; the larger, the more important


def _visible(w: Tensor) -> Tensor:
    """How many cells each query sees, [T, 1]."""
    return torch.arange(1, w.shape[1] + 1)[:, None]


def first(w: Tensor) -> Tensor:
    """The attention that a token pays to the first one: the paper's score."""
    return w[:, :, 0].mean(0)


def received(w: Tensor) -> Tensor:
    """The attention that later tokens pay to it, as a multiple of what even attention would pay."""
    own = w.mean(0)
    later = torch.ones_like(own).tril(-1)
    return (own * later).sum(0) / (later / _visible(w)).sum(0).clamp(min=1e-9)


def _tail(w: Tensor, n: int) -> Tensor:
    return w[:, -n:] * _visible(w)[-n:]


def recent(w: Tensor) -> Tensor:
    """The attention that the last 8 tokens pay to it."""
    return _tail(w, QUERIES).mean((0, 1))


def window(w: Tensor) -> Tensor:
    """The attention that the last 64 tokens pay to it."""
    return _tail(w, WINDOW).mean((0, 1))


def recent_max(w: Tensor) -> Tensor:
    """The largest attention that any head pays to it, mean over the last 8 tokens."""
    return _tail(w, QUERIES).mean(1).amax(0)


def received_max(w: Tensor) -> Tensor:
    """`received`, but of the head that pays most."""
    later = torch.ones_like(w[0]).tril(-1)
    return ((w * later).sum(1) / (later / _visible(w)).sum(0).clamp(min=1e-9)).amax(0)


def strongest(w: Tensor) -> Tensor:
    """The largest attention that any of the last 8 tokens pays in any head."""
    return _tail(w, QUERIES).amax((0, 1))


def both(w: Tensor) -> Tensor:
    """`received` or `recent`, whichever is larger."""
    return torch.maximum(received(w), recent(w))


def random(w: Tensor) -> Tensor:
    """Nothing at all."""
    return torch.rand(w.shape[1], generator=torch.Generator().manual_seed(w.shape[1]))


def oldest(w: Tensor) -> Tensor:
    """The age: what stood first leaves first."""
    return torch.arange(w.shape[1]).float()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f.__name__: f for f in (first, received, recent, window, both, random, oldest)},
    **{f.__name__: f for f in (recent_max, received_max, strongest)},
    "notfirst": lambda w: -first(w),
}


@dataclass(frozen=True)
class Plan:
    """What is dropped: shares of the tokens by layer, and how tokens are chosen."""

    shares: dict[int, float] = field(default_factory=dict)
    score: str = "recent"
    layers: int = 1  # the score is the mean over so many layers, the pruning layer being the last
    pool: int = 1  # a token counts as much as the best of so many neighbours, itself in the middle
    mean: int = 1  # the same, as much as their mean
    keep_recent: int = QUERIES  # the last tokens always stay
    keep_rare: float = 0.0  # this share of the prompt, of the rarest tokens, always stays
    reuse: bool = False  # later layers get keys and values of dropped tokens from the state in which they left


@dataclass
class _State:
    """Prompt and continuation of one sequence: keys and values of each layer, [heads, cells, size]."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    n_past: int = 0
    saved: float = 0.0  # share of the work of the prompt that was not done


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
        # Share of a layer's work that stands behind its attention.
        self.ffn_share = sum(n for name, n in block if "ffn" in name) / sum(n for _, n in block)
        self.rarity: Tensor | None = None  # by token; the larger, the rarer
        self.tap: Callable[[str, Tensor], None] | None = None  # sees the input of each matrix product of the prompt

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

    def _attend(self, h: Tensor, block: str, positions: Tensor, k: Tensor, v: Tensor, cells: Tensor) -> tuple:
        q = self.rope(self.linear(h, f"{block}.attn_q").view(len(h), self.n_head, -1), positions).transpose(0, 1)
        repeat = self.n_head // self.n_kv
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(positions[:, None] < cells[None, :], -torch.inf).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).reshape(len(h), -1)
        return self.linear(mixed, f"{block}.attn_output"), weights

    def _ffn(self, x: Tensor, block: str) -> Tensor:
        h = self.norm(x, f"{block}.ffn_norm")
        hidden = functional.silu(self.linear(h, f"{block}.ffn_gate")) * self.linear(h, f"{block}.ffn_up")
        return self.linear(hidden, f"{block}.ffn_down")

    def prompt(self, tokens: Tensor, plan: Plan) -> tuple[Tensor, _State]:
        """Logits [vocabulary] behind the prompt, and the state to go on from."""
        state = _State(n_past=len(tokens))
        x, positions, left = self.weights["token_embd"][tokens], torch.arange(len(tokens)), torch.empty(0, dtype=int)
        history = torch.zeros(0, len(tokens))
        done, gone = 0.0, x[:0]  # gone: states of the dropped tokens
        for i in range(self.n_layer):
            block = f"blk.{i}"
            here, cells = self.norm(x, f"{block}.attn_norm"), positions
            k, v = self._keys_values(here, block, positions)
            if plan.reuse and len(left):
                old = self._keys_values(self.norm(gone, f"{block}.attn_norm"), block, left)
                k, v, cells = torch.cat([k, old[0]], 1), torch.cat([v, old[1]], 1), torch.cat([positions, left])
            mixed, weights = self._attend(here, block, positions, k, v, cells)
            state.keys.append(k)
            state.values.append(v)
            x = x + mixed
            done += len(x) * (1 - self.ffn_share)
            if plan.shares:
                row = torch.zeros(len(tokens))
                row[positions] = SCORES[plan.score](weights[:, :, : len(positions)])
                history = torch.cat([history, row[None]])
            if i in plan.shares:
                keep = self._choose(history[-plan.layers :, positions].mean(0), tokens[positions], plan, i)
                gone, left = torch.cat([gone, x[~keep]]), torch.cat([left, positions[~keep]])
                x, positions = x[keep], positions[keep]
            done += len(x) * self.ffn_share
            x = x + self._ffn(x, block)
        state.saved = 1 - done / (len(tokens) * self.n_layer)
        return self.linear(self.norm(x[-1], "output_norm"), "output"), state

    def _choose(self, importance: Tensor, tokens: Tensor, plan: Plan, layer: int) -> Tensor:
        """Which tokens stay, [T] bool: exactly a share of them leaves."""
        importance = functional.max_pool1d(importance[None, None], plan.pool, 1, plan.pool // 2)[0, 0]
        importance = functional.avg_pool1d(importance[None, None], plan.mean, 1, plan.mean // 2)[0, 0]
        n = len(importance)
        if plan.keep_rare and self.rarity is not None:
            importance[self.rarity[tokens].topk(int(plan.keep_rare * n)).indices] = torch.inf
        importance[0] = torch.inf
        importance[n - max(1, plan.keep_recent) :] = torch.inf
        keep = torch.ones(n, dtype=torch.bool)
        keep[importance.argsort(stable=True)[: int(plan.shares[layer] * n)]] = False
        return keep | importance.isinf()

    def go_on(self, tokens: Tensor, state: _State) -> Tensor:
        """Logits [T, vocabulary] of tokens behind what was read before; nothing is dropped."""
        x = self.weights["token_embd"][tokens]
        positions = torch.arange(state.n_past, state.n_past + len(tokens))
        state.n_past += len(tokens)
        for i in range(self.n_layer):
            block = f"blk.{i}"
            here = self.norm(x, f"{block}.attn_norm")
            k, v = self._keys_values(here, block, positions)
            old = state.keys[i].shape[1]
            state.keys[i], state.values[i] = torch.cat([state.keys[i], k], 1), torch.cat([state.values[i], v], 1)
            cells = torch.cat([torch.zeros(old, dtype=int), positions])  # older cells are visible, wherever they stood
            x = x + self._attend(here, block, positions, state.keys[i], state.values[i], cells)[0]
            x = x + self._ffn(x, block)
        return self.linear(self.norm(x, "output_norm"), "output")


# measuring


@dataclass(frozen=True)
class Example:
    """A prompt and what follows it."""

    prompt: Tensor
    following: Tensor


def log_probabilities(model: TorchLlama, example: Example, plan: Plan) -> tuple[Tensor, float]:
    """Log-probabilities [following, vocabulary] of what follows, and the share of the prompt's work that was saved."""
    last, state = model.prompt(example.prompt, plan)
    rest = model.go_on(example.following[:-1], state) if len(example.following) > 1 else last[:0].view(0, len(last))
    return torch.cat([last[None], rest]).log_softmax(-1), state.saved


@dataclass
class Outcome:
    """Means over examples."""

    nll: float
    kl: float
    right: float  # share of examples whose whole following text is the likeliest
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
    """The model's own tokenizer, without special tokens unless the text spells them."""
    from agq_gguf.host import Model

    model = Model(path, vocab_only=True)
    return lambda text, bos: torch.from_numpy(
        model.tokenize(text, add_special=bos, parse_special=True).astype(np.int64)
    )


def text_examples(tokens: Tensor, length: int, count: int) -> list[Example]:
    """Prompts of `length` tokens spread over a text, and the 64 tokens behind each."""
    starts = np.linspace(0, len(tokens) - length - FOLLOWING, count).astype(int)
    return [Example(tokens[s : s + length], tokens[s + length : s + length + FOLLOWING]) for s in starts]


def recall_examples(path: Path, tokenize: Callable[[str, bool], Tensor], count: int) -> list[Example]:
    """Prompts with a question at their end, and the answers."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [Example(tokenize(e["prompt"], True), tokenize(e["answer"], False)) for e in lines]


# Variants, as parse_variant reads them.
VARIANTS = """
first first+keep64 first+pool5+keep64 notfirst received recent window both random oldest
random+keep64 received+keep64 recent+keep64 recent_max+keep64 received_max+keep64 strongest+keep64 both+keep64
received+pool3+keep64 recent+pool3+keep64 received+pool5+keep64 recent+pool5+keep64 recent+pool9+keep64
recent+mean5+keep64 recent_max+pool5+keep64 window+pool5+keep64 recent+keep32 recent+keep128 received+keep128
received+layers2+keep64 recent+layers2+keep64 recent+layers99+keep64 recent+rare0.1+keep64 received+rare0.1+keep64
random+reuse+keep64 received+reuse+keep64 recent+reuse+keep64
"""


def parse_variant(text: str, plan: Plan) -> Plan:
    """``recent+pool5+keep64``: a score and what is done with it; see the fields of `Plan`."""
    score, *changes = text.split("+")
    plan = replace(plan, score=score)
    for change in changes:
        name, number = re.fullmatch(r"([a-z]+)([\d.]*)", change).groups()
        field_name = {"keep": "keep_recent", "rare": "keep_rare"}.get(name, name)
        value = {"reuse": bool, "rare": float}.get(name, int)(number or 1)
        plan = replace(plan, **{field_name: value})
    return plan


def sets(args: argparse.Namespace, model: TorchLlama) -> Iterator[tuple[str, list[Example]]]:
    """The sets of examples that were asked for."""
    tokenize = tokenizer_of(args.model)
    if args.text:
        tokens = tokenize(args.text.read_text(encoding="utf-8"), True)
        counts = torch.bincount(tokens, minlength=len(model.weights["token_embd"]))
        model.rarity = -counts.float()
        yield "text", text_examples(tokens, args.length, args.count)
    if args.recall:
        yield "recall", recall_examples(args.recall, tokenize, args.count)


def scores(args: argparse.Namespace) -> None:
    """A table: every variant on every set of examples."""
    model, plan = TorchLlama(args.model), parse_plan(args.plan)
    for name, examples in sets(args, model):
        full = [log_probabilities(model, e, Plan())[0] for e in examples]
        base = measure(model, examples, Plan(), full)
        lengths = [len(e.prompt) for e in examples]
        print(f"\n{name}: {len(examples)} prompts of {min(lengths)}..{max(lengths)} tokens, plan {args.plan}")
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
    """Largest input of each matrix product against its root mean square, in the layers behind the first pruning one."""
    model, plan = TorchLlama(args.model), parse_plan(args.plan)
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
    """What int8 with one scale per token loses of each token, relative, [T]."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return ((x / scale).round() * scale - x).square().sum(1) / x.square().sum(1)


def parse_plan(text: str) -> Plan:
    """``2:0.3,4:0.5`` as shares by layer."""
    parts = (part.split(":") for part in text.split(","))
    return Plan({int(layer): float(share) for layer, share in parts})


def main() -> None:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scores", "outliers"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--plan", default="2:0.4", help="share dropped by layer, such as 1:0.2,3:0.4")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--recall", type=Path)
    parser.add_argument("--length", type=int, default=448, help="tokens of a prompt from --text")
    parser.add_argument("--count", type=int, default=24, help="prompts")
    parser.add_argument("--only", action="append", help="a variant, as the table names it; may be repeated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        {"scores": scores, "outliers": outliers}[args.what](args)


if __name__ == "__main__":
    main()
