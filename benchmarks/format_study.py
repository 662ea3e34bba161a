"""Compares formats of 4-bit weights and 8-bit activations on trained models in PyTorch; the basis for AGQ4's design.

Every figure is a distance from the same model in f32, on text that calibration has not seen. For a language model (the
demo model) it is the KL divergence of the next token; for an encoder (BERT in Hugging Face's files) it is 1 - cosine of
sentence embeddings; both are multiplied by 1000. These commands made the tables of docs/research/format-study.md:

    python benchmarks/format_study.py story --calibration calibration.txt --test evaluation.txt  (of agq_gguf/data)
    python benchmarks/format_study.py bert --model FOLDER --calibration A.txt --test B.txt

Nothing here is used at run time; ``agq_gguf`` has its own quantizer.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from format_methods import (
    Refinement,
    Scheme,
    Stats,
    q8_0,
    quantize,
    quantize_activations,
    refine,
    rotated,
    sorted_refine,
    threshold_refine,
)
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]


# models


@dataclass
class Subject:
    """A trained model to study: its matrices, and its distance from itself in f32."""

    model: nn.Module
    linears: dict[str, nn.Linear]
    calibration: list[torch.Tensor]
    distance: Callable[[], float]
    tests: list[torch.Tensor]
    stats: dict[str, Stats] = field(default_factory=dict)
    unseen: dict[str, Stats] = field(default_factory=dict)

    def calibrate(self) -> None:
        """Collects statistics of calibration and test text."""
        self.stats, self.unseen = self._gather(self.calibration), self._gather(self.tests)

    def output_error(self, new: dict[str, torch.Tensor]) -> float:
        """Mean over matrices of |X W' - X W|^2 / |X W|^2 on the test text, in percent; less noisy than a distance."""
        errors = []
        for name, weight in new.items():
            old, hessian = self.linears[name].weight.data, self.unseen[name].hessian
            delta = weight - old
            errors.append(((delta @ hessian) * delta).sum() / ((old @ hessian) * old).sum())
        return 100 * float(torch.stack(errors).mean())

    def _gather(self, batches: list[torch.Tensor]) -> dict[str, Stats]:
        """Statistics of every matrix's input in f32; matrices with the same input share them."""
        found: dict[str, Stats] = {}

        def tap(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0].detach().flatten(0, -2)
                old = found.get(name)
                keep = x[:: max(1, len(x) // 64)][:64]
                if old is None:
                    found[name] = Stats(x.T @ x, x.abs().amax(0), keep)
                else:
                    old.hessian += x.T @ x
                    old.amax = torch.maximum(old.amax, x.abs().amax(0))
                    old.rows = torch.cat([old.rows, keep]) if len(old.rows) < 768 else old.rows

            return hook

        hooks = [linear.register_forward_pre_hook(tap(name)) for name, linear in self.linears.items()]
        with torch.no_grad():
            for batch in batches:
                self.model(batch)
        for hook in hooks:
            hook.remove()
        for name, linear in self.linears.items():
            mine = found[name]
            shared = next((s for s in found.values() if s is mine or torch.equal(s.amax, mine.amax)), mine)
            cost = linear.weight.detach().square().sum(0)
            shared.importance = cost + (shared.importance if len(shared.importance) > 1 else 0)
            found[name] = shared
        return found

    @contextmanager
    def weights(self, new: dict[str, torch.Tensor]) -> Iterator[None]:
        """A block in which the model has other weights."""
        old = {name: self.linears[name].weight.data for name in new}
        for name, weight in new.items():
            self.linears[name].weight.data = weight
        try:
            yield
        finally:
            for name, weight in old.items():
                self.linears[name].weight.data = weight

    @contextmanager
    def activations(self, rounding: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """A block in which the inputs of the model's matrices are rounded."""
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: (rounding(name, args[0]),))
            for name, linear in self.linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def quantized(self, scheme: Scheme) -> dict[str, torch.Tensor]:
        """All matrices, rounded with the scheme."""
        return {
            name: quantize(linear.weight.data, self.stats[name].hessian, scheme)
            for name, linear in self.linears.items()
        }


def load_story(path: Path, calibration: str, test: str) -> Subject:
    """The demo model in PyTorch; distance: 1000 times the KL divergence from f32 per token."""
    sys.path.insert(0, str(ROOT / "examples"))
    import gguf
    import llama_cpp
    from train_story_model import Shape, StoryModel

    model = StoryModel(Shape())
    tensors = gguf.GGUFReader(path).tensors
    model.load_state_dict({t.name: torch.tensor(t.data).float() for t in tensors}, strict=True)
    model.eval()
    host = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def windows(text: str, limit: int) -> list[torch.Tensor]:
        tokens = torch.tensor(host.tokenize(text.encode(), add_bos=True))[:limit]
        return list(tokens[: len(tokens) // 2048 * 2048].view(-1, 4, 512))

    tests = windows(test, 12288)
    with torch.no_grad():
        wanted = [functional.log_softmax(model(batch), -1) for batch in tests]
    loss = sum(-w[:, :-1].gather(2, b[:, 1:, None]).mean() for w, b in zip(wanted, tests, strict=True)) / len(tests)
    print(f"perplexity of the test text {float(loss.exp()):.3f}, {len(tests) * 2048} tokens")

    def distance() -> float:
        with torch.no_grad():
            got = [functional.log_softmax(model(batch), -1) for batch in tests]
        return 1000 * float(
            torch.stack([(w.exp() * (w - g)).sum(-1).mean() for w, g in zip(wanted, got, strict=True)]).mean()
        )

    linears = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    return Subject(model, linears, windows(calibration, 20480), distance, tests)


def load_bert(path: Path, calibration: str, test: str) -> Subject:
    """A sentence encoder from Hugging Face files; distance: 1000 times 1 - cosine with the mean embeddings of f32."""
    import transformers

    encoder = transformers.BertModel.from_pretrained(path, attn_implementation="sdpa").float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    class Embedder(nn.Module):
        """Normalized mean of the last layer."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            """Embeddings (batch, n_embd) of token numbers (batch, tokens), without padding."""
            return functional.normalize(self.encoder(tokens).last_hidden_state.mean(1), dim=-1)

    model = Embedder().eval()

    def windows(text: str, limit: int) -> list[torch.Tensor]:
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:limit])
        body = tokens[: len(tokens) // 62 * 62].view(-1, 62)
        first, last = (
            torch.full((len(body), 1), tokenizer.cls_token_id),
            torch.full((len(body), 1), tokenizer.sep_token_id),
        )
        return list(torch.cat([first, body, last], 1).split(32))

    tests = windows(test, 62 * 128)
    with torch.no_grad():
        wanted = [model(batch) for batch in tests]

    def distance() -> float:
        with torch.no_grad():
            got = [model(batch) for batch in tests]
        return 1000 * float(1 - torch.cat([(w * g).sum(-1) for w, g in zip(wanted, got, strict=True)]).mean())

    linears = {n: p for n, p in model.named_modules() if isinstance(p, nn.Linear) and "pooler" not in n}
    return Subject(model, linears, windows(calibration, 62 * 256), distance, tests)


# studies


def row(*cells: object) -> None:
    """Prints one line of a table."""
    texts = [f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def study_formats(subject: Subject) -> None:
    """Compares weight formats and methods of rounding, with f32 activations."""
    row(
        "weights",
        "bpw",
        "rounding",
        "search E[x^2]",
        "error feedback",
        "output error %: rounding",
        "search",
        "feedback",
    )
    formats = {
        "uniform, zero point, g128, binary16": (4.25, Scheme(128, "16", "uniform")),
        "fixed codebook (8 bits) g128, binary16": (4.19, Scheme(128, "16", "fixed8")),
        "fixed codebook (8 bits) g128, two 4-bit sub-scales": (4.25, Scheme(128, "sub", "fixed8")),
        "learned codebook (7 bits) g128, two 4-bit sub-scales": (4.25, Scheme(128, "sub", "learned7")),
        "fixed codebook (8 bits) g64, binary16": (4.31, Scheme(64, "16", "fixed8")),
        "fixed codebook (7 bits) g64, binary16": (4.31, Scheme(64, "16", "fixed7")),
        "fixed codebook (7 bits) g64, 12-bit scale": (4.25, Scheme(64, "12", "fixed7")),
        "learned codebook (not rounded) g64, 12-bit scale": (4.25, Scheme(64, "12", "learned")),
        "**learned codebook (7 bits) g64, 12-bit scale**": (4.25, Scheme(64, "12", "learned7")),
        "learned codebook (7 bits) g128, 12-bit scale": (4.16, Scheme(128, "12", "learned7")),
        "learned codebook (7 bits) g32, 12-bit scale": (4.44, Scheme(32, "12", "learned7")),
    }
    for name, (bits, scheme) in formats.items():
        distances, errors = [], []
        plain = replace(scheme, gptq=False, weighted=False, candidates=1, refit=False)
        for variant in (plain, replace(scheme, gptq=False), scheme):
            new = subject.quantized(variant)
            errors.append(subject.output_error(new))
            with subject.weights(new):
                distances.append(subject.distance())
        row(name, f"{bits:.2f}", *distances, *errors)


def study_procedure(subject: Subject) -> None:
    """Compares options of the quantizer: iterations, candidates, damping, order."""
    variants = {f"Lloyd iterations {n}": Scheme(lloyd=n) for n in (0, 1, 2, 4, 8, 16)}
    variants |= {f"scale candidates {n}": Scheme(candidates=n) for n in (1, 4, 12, 40)}
    variants["12 candidates, no refit"] = Scheme(refit=False)
    variants["1 candidate, no refit"] = Scheme(candidates=1, refit=False)
    variants["scales and codebook not weighted by E[x^2]"] = Scheme(weighted=False)
    variants |= {f"damping {d}": Scheme(damp=d) for d in (0.001, 0.003, 0.01, 0.03, 0.1)}
    variants["scales weighted by 1 / U^2"] = Scheme(inverse=True)
    variants["most active group first, and column in it"] = Scheme(order="groups")
    variants["most active group first, scales weighted by 1 / U^2"] = Scheme(order="groups", inverse=True)
    variants["most active column first, groups and scales stay"] = Scheme(order="static")
    variants["most active column first, stored in that order"] = Scheme(order="stored")
    variants["the same, scales weighted by 1 / U^2"] = Scheme(order="stored", inverse=True)
    variants["the same, fixed codebook"] = Scheme(order="stored", inverse=True, codebook="fixed7")
    row("procedure (learned 7-bit codebook, g64, 12-bit scale, error feedback)", "distance", "output error %", "s")
    for name, scheme in variants.items():
        began = time.monotonic()
        new = subject.quantized(scheme)
        seconds, error = time.monotonic() - began, subject.output_error(new)
        with subject.weights(new):
            row(name, subject.distance(), error, round(seconds))


def study_activations(subject: Subject) -> None:
    """Compares activation modes, with f32 weights and with AGQ4 weights."""
    weights = subject.quantized(Scheme())
    stats = subject.stats
    few, many = (0, 16, 32, 64), (0, 16, 32, 64, 128, 192)
    rules: dict[str, Callable[[Stats, int], Refinement | None]] = {
        "none": lambda s, b: None,
        "r in 1..6, no channel order": lambda s, b: refine(s, (1, 2, 3, 4, 5, 6), (0,), b),
        "r = 2": lambda s, b: refine(s, (2,), few, b),
        "r = 3": lambda s, b: refine(s, (3,), few, b),
        "r = 4": lambda s, b: refine(s, (4,), few, b),
        "r in 2, 3, 4": lambda s, b: refine(s, (2, 3, 4), few, b),
        "r in 2, 3, 4, by absolute error": lambda s, b: refine(s, (2, 3, 4), few, b, relative=False),
        "r in 1..6, up to 192 listed": lambda s, b: refine(s, (1, 2, 3, 4, 5, 6), many, b),
        "any exponents, up to 192 listed": lambda s, b: refine(s, (-4, -6, 1, 2, 3, 4, 5, 6), many, b),
        "any exponents, all channels sorted": lambda s, b: refine(s, (-4, -6, -8), (len(s.amax) - 1,), b),
        "amax > 4 medians, r = 2": lambda s, b: threshold_refine(s, 2, 4.0),
        "amax > 8 medians, r = 3": lambda s, b: threshold_refine(s, 3, 8.0),
    }
    row("activations", "weights f32", "weights AGQ4")

    def measure(name: str, rounding: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        with subject.activations(rounding):
            plain = subject.distance()
            with subject.weights(weights):
                row(name, plain, subject.distance())

    measure("f32", lambda name, x: x)
    for bits in (8, 4):
        for label, rule in rules.items():
            # inputs that q, k and v share have one Stats object, and so one refinement
            if bits == 4 and not label.startswith(("none", "r = 2", "r in 1..6, up")):
                continue
            known = {id(s): rule(s, bits) for s in stats.values()}
            used = sum(known[id(s)] is not None for s in stats.values())
            measure(
                f"int{bits} per token, {label} (used for {used} of {len(stats)})",
                lambda name, x, b=bits, known=known: quantize_activations(x, b, 0, known[id(stats[name])]),
            )
        for group in (128, 64):
            measure(f"int{bits} per (token, {group})", lambda name, x, b=bits, g=group: quantize_activations(x, b, g))
        measure(
            f"int{bits} per (token, 64), channels sorted",
            lambda name, x, b=bits: quantize_activations(
                x, b, 64, Refinement(stats[name].amax.argsort(descending=True), torch.zeros(x.shape[-1] // 64))
            ),
        )
        measure(
            f"int{bits} per (token, 64), rotated",
            lambda name, x, b=bits: rotated(quantize_activations(rotated(x), b, 64)),
        )


def study_order(subject: Subject) -> None:
    """Compares columns stored by energy, unchanged, or rotated, with f32 activations and several int8 modes."""
    inputs = {id(s): s for s in subject.stats.values()}
    listed = {key: refine(s, (2,), (0, 16, 32, 64), 8) for key, s in inputs.items()}
    by_energy = {key: sorted_refine(s) for key, s in inputs.items()}
    variants = {
        "as they are, scales weighted by E[x^2]": Scheme(),
        "as they are, scales weighted by 1 / U^2": Scheme(inverse=True),
        "most active group first, 1 / U^2": Scheme(order="groups", inverse=True),
        "stored most active first, E[x^2]": Scheme(order="stored"),
        "stored most active first, 1 / U^2": Scheme(order="stored", inverse=True),
        "the same, fixed codebook": Scheme(order="stored", inverse=True, codebook="fixed7"),
        "the same, damping 0.003": Scheme(order="stored", inverse=True, damp=0.003),
        "rotated, E[x^2]": Scheme(rotated=True, order="groups"),
        "rotated, 1 / U^2": Scheme(rotated=True, order="groups", inverse=True),
    }
    row(
        "columns",
        "output error %",
        "f32 activations",
        "int8, r = 2, listed",
        "int8, all sorted by energy",
        "int8 per (token, 64)",
        "int8 per (token, 64), rotated",
    )
    ways = (lambda x: quantize_activations(x, 8, 64), lambda x: rotated(quantize_activations(rotated(x), 8, 64)))
    for name, scheme in variants.items():
        new = subject.quantized(scheme)
        cells = [subject.output_error(new)]
        with subject.weights(new):
            cells.append(subject.distance())
            for known in (listed, by_energy):
                with subject.activations(
                    lambda name, x, known=known: quantize_activations(x, 8, 0, known[id(subject.stats[name])])
                ):
                    cells.append(subject.distance())
            for way in ways:
                with subject.activations(lambda _, x, way=way: way(x)):
                    cells.append(subject.distance())
        row(name, *cells)


def study_ends(subject: Subject) -> None:
    """Compares AGQ4 and Q8_0 for the output matrix and the token embedding of the demo model."""
    model = subject.model
    body = {k: w for k, w in subject.quantized(Scheme()).items() if k != "output"}
    head, embedding = subject.linears["output"].weight.data, model.token_embd.weight.data
    heads = {"F16": head, "Q8_0": q8_0(head), "AGQ4": quantize(head, subject.stats["output"].hessian, Scheme())}
    table = quantize(embedding, torch.eye(embedding.shape[1]), Scheme(gptq=False))
    row("output head", "token embedding", "bytes of both", "distance, rest f32", "distance, rest AGQ4")
    bits = {"F16": 16, "Q8_0": 8.5, "AGQ4": 4.25}
    for a, new_head in heads.items():
        for b, new_table in {"F16": embedding, "Q8_0": q8_0(embedding), "AGQ4": table}.items():
            model.token_embd.weight.data = new_table
            with subject.weights({"output": new_head}):
                rest_f32 = subject.distance()
                with subject.weights(body):
                    row(a, b, int((bits[a] + bits[b]) * head.numel() / 8), rest_f32, subject.distance())
    model.token_embd.weight.data = embedding


STUDIES = {
    "formats": study_formats,
    "procedure": study_procedure,
    "activations": study_activations,
    "order": study_order,
    "ends": study_ends,
}


def main() -> None:
    """Runs the requested studies and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("story", "bert"))
    parser.add_argument("--model", type=Path, default=ROOT / "agq_gguf" / "data" / "story-f16.gguf")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--studies", default="formats,procedure,activations")
    parser.add_argument("--only", default="", help="quantize only matrices whose name matches this regular expression")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = load_story if args.kind == "story" else load_bert
    subject = load(args.model, args.calibration.read_text("utf-8"), args.test.read_text("utf-8"))
    subject.linears = {name: part for name, part in subject.linears.items() if re.search(args.only, name)}
    subject.calibrate()
    for name in args.studies.split(","):
        began = time.monotonic()
        print(f"\n### {args.kind}: {name}\n", flush=True)
        STUDIES[name](subject)
        print(f"\n({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    with torch.no_grad():
        main()
