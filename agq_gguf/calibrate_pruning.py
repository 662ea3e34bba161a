"""Chooses pruning layers and thresholds on calibration text, by running the model, and writes them into the file.

Prompts are cut from the text. Every second one ends with the beginning of an earlier part of it, as a question ends a
prompt. The model runs them with pruning as it will run later, inside the plugin, and what it then says about the 64
tokens that follow, or about the rest of the repeated part, is compared with what it says when nothing is dropped. See
docs/pruning.md, "Calibration".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq_gguf import blocks
from agq_gguf.arguments import Progress
from agq_gguf.errors import AgqError, FormatError, HostError, InputError
from agq_gguf.evaluate import compare, read_text
from agq_gguf.host import Batch, Context, Model
from agq_gguf.plugin import last_pruned, options
from agq_gguf.prune import (
    MIN_PROMPT,
    Plan,
    Work,
    droppable,
    overlooked,
    single_layers,
    split_saving,
    threshold_for,
    work_of,
)
from agq_gguf.prune_control import last_importance
from agq_gguf.prune_file import carriers, write_plan
from agq_gguf.prune_learn import learn_directions
from agq_gguf.shards import open_model

_CALL = 512  # tokens of a prompt and what follows; llama.cpp's ubatch, within which tokens are judged
_LOGITS_BYTES = 512 << 20  # of the unpruned model's logits that may be kept
_BETTER = 0.97  # of the divergence: what another pruning layer must bring to be worth it
_ENOUGH = 0.95  # of the wanted saving
_SUITS = {"learned": (32, 0)}  # keep and reach, where they are not (64, 2)
_CUE = 16  # tokens of a repeated part that end a prompt; by then a model that can copy does so


@dataclass(frozen=True)
class PruneOptions:
    """What a user can choose."""

    share: float = 0.3  # of the prompt's work that is to be saved; 0: remove the records
    score: str | None = None  # None: `recent` or `learned`, as the calibration finds
    keep: int | None = None  # None: what suits the score
    reach: int | None = None  # the same
    reuse: bool | None = None  # None: the calibration chooses
    layers: tuple[int, ...] | None = None  # None: the calibration chooses
    max_layers: int = 3
    candidates: int = 6  # layers that are tried
    prompts: int = 16
    following: int = 64  # tokens behind a prompt
    curve: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    threads: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for what makes no sense."""
        if not 0 <= self.share <= 0.9:
            raise InputError(f"a share of {self.share} cannot be saved; wanted is 0 to 0.9")
        if self.score is not None and self.score not in blocks.SCORES:
            raise InputError(f"unknown score {self.score!r}; known are {', '.join(blocks.SCORES)}")
        if not 0 <= (self.keep or 0) <= blocks.MAX_KEEP or not 0 <= (self.reach or 0) <= blocks.MAX_REACH:
            raise InputError(f"keep can be 0 to {blocks.MAX_KEEP} tokens, reach 0 to {blocks.MAX_REACH}")

    def plan(self, *thresholds: tuple[int, float]) -> Plan:
        """With these thresholds by layer."""
        score = self.score or "recent"
        keep, reach = _SUITS.get(score, (64, 2))
        return Plan(
            thresholds,
            score,
            keep if self.keep is None else self.keep,
            reach if self.reach is None else self.reach,
            bool(self.reuse),
        )

    def ways(self) -> list[PruneOptions]:
        """What is left open, decided in each way that is worth a try."""
        scores = (self.score,) if self.score else ("recent", "learned")
        reuse = (False, True) if self.reuse is None else (self.reuse,)
        # What states are still good for is what a learned score tells.
        tried = [
            (score, again) for score in scores for again in reuse if score != "learned" or again or len(reuse) == 1
        ]
        return [replace(self, score=score, reuse=again) for score, again in tried]


@dataclass(frozen=True)
class Point:
    """A plan as measured: what it saves, and what that costs."""

    plan: Plan
    saving: float  # share of the work of the prompts
    kl: float  # of the tokens that follow, to the unpruned model, mean, in nats
    nll: float  # of the tokens that follow, mean, in nats
    echo_kl: float  # KL of a part of the prompt that is repeated behind it


@dataclass(frozen=True)
class PruneReport:
    """What calibration found."""

    chosen: Point
    curve: list[Point]
    nll: float  # of the tokens that follow, nothing dropped
    origin: str  # what it was calibrated on
    carriers: dict[int, str] = field(default_factory=dict)  # the tensor that holds the record of a layer


@dataclass(frozen=True)
class Example:
    """A prompt and what follows it: in the text, or (an echo) in the part that the prompt's end begins to repeat."""

    prompt: NDArray[np.int32]
    following: NDArray[np.int32]
    is_echo: bool = False


@dataclass(frozen=True)
class Run:
    """What one pass over all examples showed, in lists over examples."""

    left: list[NDArray[np.int32]]  # layer where each prompt token left, or -1
    importance: dict[int, list[NDArray[np.float32]]]  # of the probed layers
    kl: float
    nll: float
    echo_kl: float

    @property
    def cost(self) -> float:
        """What a choice is judged by."""
        return self.kl + self.echo_kl


Runner = Callable[[Plan, Sequence[int]], Run]  # plan, layers where importance is wanted but nothing dropped


def make_examples(tokens: NDArray[np.int32], count: int, following: int, context: int) -> list[Example]:
    """Cuts up to `count` examples out of a text, evenly spread; fewer if the text is short. Raises InputError."""
    length = min(_CALL, context) - following
    if length < 2 * MIN_PROMPT:
        raise InputError(f"a context of {context} tokens is too short to prune prompts in it")
    room = len(tokens) - length - following
    if room < 0:
        raise InputError(f"the text has {len(tokens)} tokens; at least {length + following} are needed")
    starts = np.linspace(0, room, max(2, min(count, 1 + room // following))).astype(np.int64)
    examples = []
    for i, start in enumerate(starts):
        prompt = tokens[start : start + length].copy()
        if i % 2 == 0:
            examples.append(Example(prompt, tokens[start + length : start + length + following]))
            continue
        # Parts from all over the prompts, but not from their very end, which nobody drops.
        at = 1 + (i * (length - 3 * following)) // (len(starts) - 1)
        part = prompt[at : at + _CUE + following // 2].copy()
        prompt[-_CUE:] = part[:_CUE]
        examples.append(Example(prompt, part[_CUE:], is_echo=True))
    return examples


# choosing


def plan_for(
    run: Runner, work: Work, layers: Sequence[int], saving: float, base: Run, choice: PruneOptions
) -> tuple[Plan, Run]:
    """Thresholds behind these layers that save so much of the work, and the run with them.

    Each layer contributes the same saving; where a layer has too few tokens left, what it cannot drop is missing.
    """
    tokens = sum(map(len, next(iter(base.importance.values()))))
    shares = split_saving(work, layers, [1.0] * len(layers), saving)
    plan, seen = choice.plan(), base
    for i, (layer, share) in enumerate(zip(layers, shares, strict=True)):
        threshold = threshold_for(seen.importance[layer], round(share * tokens))
        plan = choice.plan(*plan.thresholds, (layer, threshold))
        seen = run(plan, layers[i + 1 : i + 2])
    return plan, seen


def choose_layers(run: Runner, work: Work, allowed: Sequence[int], base: Run, choice: PruneOptions) -> tuple[int, ...]:
    """The layers behind which the wanted saving costs least: the best single one, then whatever improves on it."""
    tokens = sum(map(len, base.importance[allowed[0]]))
    most = droppable(base.importance[allowed[0]]) / tokens

    def tried(saving: float) -> list[int]:
        def missed(layer: int) -> float:
            return overlooked(base.importance, layer, round(saving / work.worth(layer) * tokens))

        return single_layers(work, saving, allowed, most, choice.candidates, missed)

    candidates = tried(choice.share)
    if not candidates:
        raise InputError(
            f"a saving of {choice.share:.0%} is out of reach: at most {most:.0%} of the tokens of a calibration prompt "
            f"can leave, and behind layer {allowed[0]} at the earliest; ask for less, or keep fewer of the last tokens"
        )
    later = tried(choice.share / 2)
    best: tuple[float, tuple[int, ...]] = (np.inf, ())
    for size in range(1, choice.max_layers + 1):
        extensions = [(layer,) for layer in candidates] if size == 1 else _extend(best[1], {*candidates, *later})
        runs = [(plan_for(run, work, layers, choice.share, base, choice)[1], layers) for layers in extensions]
        # Several layers may not reach what each of them could alone, with equal parts.
        found = [(seen.cost, layers) for seen, layers in runs if work.saving(seen.left) > _ENOUGH * choice.share]
        if not found or min(found)[0] > _BETTER * best[0]:
            break
        best = min(found)
    if not best[1]:
        raise InputError(f"no layer was found behind which a share of {choice.share:.0%} is saved; ask for less")
    return best[1]


def _extend(layers: tuple[int, ...], more: Iterable[int]) -> list[tuple[int, ...]]:
    return [tuple(sorted((*layers, layer))) for layer in sorted(set(more) - set(layers))]


def choose(run: Runner, work: Work, allowed: Sequence[int], choice: PruneOptions) -> tuple[Point, list[Point], float]:
    """The plan for the wanted share, the curve of savings with its layers, and the unpruned NLL."""
    base = run(choice.plan(), allowed)
    layers = choice.layers or choose_layers(run, work, allowed, base, choice)
    chosen = None
    points: list[Point] = []
    for saving in sorted({*choice.curve, choice.share}):
        plan, found = plan_for(run, work, layers, saving, base, choice)
        point = Point(plan, work.saving(found.left), found.kl, found.nll, found.echo_kl)
        if saving == choice.share:
            chosen = point
        if not points or point.saving > points[-1].saving + 0.01:  # at the end of the reach nothing changes any more
            points.append(point)
    assert chosen is not None
    return chosen, points, base.nll


# running


class _Runtime:
    """The model, run by the plugin on all examples. The first run must be of a plan that drops nothing."""

    def __init__(self, model: Model, examples: list[Example], threads: int, progress: Callable[[], None]):
        self.model, self._examples, self._threads, self._progress = model, examples, threads, progress
        self._reuse = False
        self._full: list[NDArray[np.float32]] = []  # logits of the unpruned model by example

    def __call__(self, plan: Plan, probed: Sequence[int]) -> Run:
        self._reuse = plan.reuse
        size = max(len(e.prompt) + len(e.following) for e in self._examples)
        left: list[NDArray[np.int32]] = []
        importance: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in probed}
        rows: dict[bool, list[NDArray[np.float64]]] = {False: [], True: []}
        with ExitStack() as stack:
            with options(prune=plan.spec(probed)):
                context = stack.enter_context(self.model.context(size, n_ubatch=size, threads=self._threads))
            for i, example in enumerate(self._examples):
                logits = self._logits(context, example, left, importance)
                if len(self._full) <= i:
                    self._full.append(logits)
                rows[example.is_echo].append(compare(self._full[i], logits, example.following))
                self._progress()
        _, nll, kl, _ = np.concatenate(rows[False]).T
        echo_kl = np.concatenate(rows[True])[:, 2]
        if not (np.isfinite(nll).all() and np.isfinite(kl).all() and np.isfinite(echo_kl).all()):
            raise InputError(f"{self.model.path}: its logits hold values that are not finite; the weights are damaged")
        return Run(left, importance, float(kl.mean()), float(nll.mean()), float(echo_kl.mean()))

    def _logits(
        self,
        context: Context,
        example: Example,
        left: list[NDArray[np.int32]],
        importance: dict[int, list[NDArray[np.float32]]],
    ) -> NDArray[np.float32]:
        """Logits of the tokens that follow; adds what the prompt's call showed."""
        n = len(example.prompt)
        context.clear()
        prompt = Batch(example.prompt)
        context.decode(prompt)
        left.append(np.array(last_pruned(), np.int32))
        for layer, values in importance.items():
            values.append(last_importance(layer))
        found = [left[-1], *(values[-1] for values in importance.values())]
        if any(len(values) != n for values in found):
            without = "; it may be possible with --no-reuse" if self._reuse else ""
            raise HostError(
                f"{self.model.path}: the plugin cannot prune this model; its log says why (--debug){without}"
            )
        first = context.logits(prompt)[-1:].copy()
        batch = Batch(example.following[:-1], first_position=n, first_logits=0)
        context.decode(batch)
        return np.concatenate([first, context.logits(batch)])


def calibrate_pruning(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str] | None = None,
    choice: PruneOptions | None = None,
    progress: Progress | None = None,
) -> PruneReport | None:
    """Chooses what the AGQ4 model `src` prunes so that the wanted share is saved, and writes it, with that, to `dst`.

    `dst` may be `src`; it is replaced when all went well. `calibration` is a text file, ideally like what the model
    will read. With a share of 0 the model's pruning is removed, which needs no text, and nothing is returned. Raises
    InputError, FormatError, HostError or OutputError; `dst` is untouched then.
    """
    choice, progress = choice or PruneOptions(), progress or _silent
    with open_model(src) as reader:
        held_by = carriers(reader)
        if choice.share == 0:
            write_plan(reader, dst, {}, {}, progress)
            return None
        if calibration is None:
            raise InputError("choosing what to prune needs a text; give one with --calibration")
        if not held_by:
            raise FormatError(f"{src}: holds no AGQ4 matrix that can take a pruning record; quantize the model first")
        sizes = {name: tensor.n_elements for name, tensor in reader.tensors.items()}
    work = work_of(sizes)
    allowed = sorted(layer for layer in held_by if layer < work.n_layer - 1)
    if choice.layers and (missing := sorted(set(choice.layers) - set(allowed))):
        raise InputError(f"{src}: layer {missing[0]} cannot be a pruning layer; possible are {allowed}")
    text = read_text(calibration)
    found: list[tuple[tuple[Point, list[Point], float], _Holders]] = []
    refused: list[AgqError] = []
    with Model(src) as model, ExitStack() as stack:
        model.require_logits()
        examples = _examples(model, text, choice)
        ways = choice.ways()
        run = _counted(model, examples, work, allowed, choice, len(ways), progress)
        for way in ways:
            try:
                holders = _Holders(held_by, {})
                if way.score == "learned":
                    holders = _learned(src, model, model.tokenize(text), allowed, way, progress)
                    run.model = stack.enter_context(_taught(src, dst, holders, way))
                layers = sorted(set(allowed) & set(holders.tensors))
                found.append((choose(run, work_of(sizes, bool(way.reuse)), layers, way), holders))
            except (InputError, HostError) as e:  # out of reach, or not for this architecture; another way may do
                refused.append(e)
        if not found:
            raise refused[0]
        (chosen, curve, nll), holders = min(found, key=lambda tried: tried[0][0].kl + tried[0][0].echo_kl)
    origin = f"{Path(calibration).name}, {len(examples)} prompts of {len(examples[0].prompt)} tokens"
    report = PruneReport(chosen, curve, nll, origin, {layer: holders.tensors[layer] for layer in chosen.plan.layers})
    with open_model(src) as reader:
        write_plan(reader, dst, holders.records(chosen.plan), metadata_of(report), progress)
    return report


@dataclass(frozen=True)
class _Holders:
    """By layer the tensor that holds its record, and the direction of a learned score."""

    tensors: dict[int, str]
    directions: dict[int, blocks.Direction]

    def records(self, plan: Plan) -> dict[str, blocks.Pruning]:
        """The plan's, by tensor."""
        return {
            self.tensors[layer]: replace(record, direction=self.directions.get(layer))
            for layer, record in plan.records().items()
        }


def _learned(
    src: str | os.PathLike[str],
    model: Model,
    tokens: NDArray[np.int32],
    allowed: Sequence[int],
    way: PruneOptions,
    progress: Progress,
) -> _Holders:
    """Directions of all layers that have room for them. Raises InputError if none has."""
    length = min(_CALL, model.n_ctx_train) - way.following
    found = learn_directions(
        model,
        tokens,
        allowed,
        following=way.following,
        length=length,
        threads=way.threads,
        progress=lambda done, total: progress("learn", done, total, "what tokens are worth"),
    )
    with open_model(src) as reader:
        tensors = carriers(reader, max(map(len, found.values())))
    if not set(tensors) & set(found):
        raise InputError(f"{src}: no AGQ4 matrix has room for a learned score; take another one")
    return _Holders(tensors, {layer: blocks.Direction.of(found[layer]) for layer in tensors if layer in found})


@contextmanager
def _taught(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], holders: _Holders, way: PruneOptions
) -> Iterator[Model]:
    """A copy of the model with all directions, because the plugin takes them from the file only."""
    with TemporaryDirectory(prefix=".agq-learned-", dir=Path(dst).absolute().parent) as folder:
        copy = Path(folder) / "model.gguf"
        with open_model(src) as reader:
            everywhere = way.plan(*((layer, 0.0) for layer in holders.directions))
            write_plan(reader, copy, holders.records(everywhere), {}, _silent)
        with Model(copy) as model:
            yield model


def _examples(model: Model, text: str, choice: PruneOptions) -> list[Example]:
    tokens = model.tokenize(text)
    logits_bytes = 4 * model.n_vocab * choice.following
    count = max(2, min(choice.prompts, _LOGITS_BYTES // logits_bytes))
    examples = make_examples(tokens, count, choice.following, model.n_ctx_train)
    if model.add_bos:
        for example in examples:
            example.prompt[0] = model.bos
    return examples


def _counted(
    model: Model,
    examples: list[Example],
    work: Work,
    allowed: Sequence[int],
    choice: PruneOptions,
    n_ways: int,
    progress: Progress,
) -> _Runtime:
    """The runtime, with progress in prompts of all that may have to be run."""
    per_size = [
        size * (choice.candidates if size == 1 else 2 * choice.candidates) for size in range(1, choice.max_layers + 1)
    ]
    n_layers = len(choice.layers) if choice.layers else choice.max_layers
    curve = (len(choice.curve) + 1) * n_layers
    total = len(examples) * (1 + curve + (0 if choice.layers else sum(per_size))) * n_ways
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress("prune", min(done, total), total, "choosing layers and thresholds")

    return _Runtime(model, examples, choice.threads, count)


def metadata_of(report: PruneReport) -> dict[str, Any]:
    """The keys ``agq.prune.*`` that tell people and tools what the records in the tensors say, and the curve."""
    plan, curve = report.chosen.plan, report.curve
    return {
        "agq.prune.score": plan.score,
        "agq.prune.keep": plan.keep,
        "agq.prune.reach": plan.reach,
        "agq.prune.reuse": int(plan.reuse),
        "agq.prune.layers": np.array(plan.layers, np.int32),
        "agq.prune.thresholds": np.array([value for _, value in plan.thresholds], np.float32),
        "agq.prune.saving": report.chosen.saving,
        "agq.prune.calibration": report.origin,
        "agq.prune.nll": report.nll,
        "agq.prune.curve.saving": np.array([p.saving for p in curve], np.float32),
        "agq.prune.curve.kl": np.array([p.kl for p in curve], np.float32),
        "agq.prune.curve.nll": np.array([p.nll for p in curve], np.float32),
        "agq.prune.curve.echo_kl": np.array([p.echo_kl for p in curve], np.float32),
        "agq.prune.curve.thresholds": np.array([v for p in curve for _, v in p.plan.thresholds], np.float32),
    }


def _silent(phase: str, done: int, total: int, what: str) -> None:
    """Progress nobody asked for."""
