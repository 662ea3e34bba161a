"""Calibrates the score `heads`: saves as much work as keeps a promised share of the answers.

Facts are planted in the user's text, and the model is asked for one of them. Half of the prompts choose which heads to
look at, after which layers to drop, and how much; the other half is read with that setting. See
docs/pruning-design.md, "How calibration keeps answers".
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from agq_gguf.arguments import Progress
from agq_gguf.errors import FormatError, InputError
from agq_gguf.format import pruning_record
from agq_gguf.format.pruning_record import Heads
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.pruning.answers import OFF, Answers, Questions
from agq_gguf.pruning.file import carriers
from agq_gguf.pruning.heads import Seen, choose_heads, importance, needed, survivors
from agq_gguf.pruning.options import PruneOptions
from agq_gguf.pruning.plan import Plan, Work
from agq_gguf.pruning.planted import KINDS, plant, sentences_of
from agq_gguf.pruning.report import Kept, PruneReport
from agq_gguf.pruning.search import Point
from agq_gguf.pruning.trial import Runtime, examples_of, tokens_of_text
from agq_gguf.pruning.windows import window_of, windowed_layers
from agq_gguf.runtime.model import Model
from agq_gguf.text import LoadedText

_SCORE = pruning_record.score_named("heads")
_QUESTIONS = 96
_SHORTEST, _LONGEST = 400, 800  # tokens of a prompt with planted facts
_ROOM = 64  # tokens for its answer
_FEWEST = 20  # right answers without pruning that a promise can rest on
HEADS_PER_LAYER = 4  # per pruning layer
_MAIN = 0.3  # of a prompt may stay at the main layer, if any layer needs so little
_WORTH_IT = 0.02  # a further cut must save this share of the work
_SAVING = 0.1  # a setting that saves less is not written
_MARGIN = 0.9  # thresholds are this much lower than the least important value that must stay
_CAUTION = 0.5  # of what may be lost is kept as a reserve, since other prompts may lose more
_STEPS = (0.06, 0.045, 0.03, 0.02, 0.01, 0.0)  # share of values that each cut may lose, from bold to safe
_SURE = 0.97  # share of the values that must survive in the arrays, before a setting is run


def by_answers(
    src: str | os.PathLike[str],
    text: LoadedText,
    choice: PruneOptions,
    allowed: Sequence[int],
    work: Work,
    progress: Progress,
) -> PruneReport:
    """The setting of the file `src` that saves most of what keeps the model's answers.

    `allowed` are the layers that can prune. Raises FormatError, InputError or HostError; see `keep_answers`.
    """
    with open_model(src) as reader:
        holders = carriers(reader, pruning_record.pruning_bytes(heads=HEADS_PER_LAYER))
        window = window_of(reader)
    layers = [layer for layer in allowed if layer in holders]
    if not layers:
        raise FormatError(f"{src}: has no AGQ4 matrix with room for the heads of a pruning record; give a share")
    with Model(src) as model:
        model.require_logits()
        blind = windowed_layers(model, range(max(layers) + 1), window, choice.threads)
        layers = [layer for layer in layers if not blind.issuperset(range(layer + 1))]
        if not layers:
            raise InputError(
                f"{src}: no layer before the last one sees more than a sliding window of {window} tokens; "
                "choose a share of the work with --share"
            )
        n = max(2 * len(KINDS), choice.prompts or _QUESTIONS)
        total, done = 2 * n, 0

        def count() -> None:
            nonlocal done, total
            done += 1
            if done > total:  # another setting is tried
                total += n
            progress("prune", done, total, "asking for facts in the text")

        sentences = sentences_of(text.whole)
        longest = min(_LONGEST, model.n_ctx_train - _ROOM)
        lengths = (min(_SHORTEST, longest // 2), longest)
        halves = [
            [plant(model, sentences, KINDS[i % len(KINDS)], first + i, lengths) for i in range(n // 2)]
            for first in (0, n)
        ]
        learn, check = (Questions(model, prompts, choice.threads, count) for prompts in halves)
        plan, kept = keep_answers(learn, check, work, layers, choice.answers, overlap=choice.overlap, blind=blind)
        examples = examples_of(model, tokens_of_text(model, text), choice)
        run = Runtime(model, examples, choice.threads, lambda: None)
        base, found = run(Plan(()), ()), run(plan, ())
    point = Point(plan, work.saving(found.left), found.kl, found.nll, found.echo_kl)
    origin = f"{text.name}, {n} questions about planted facts"
    return PruneReport(point, [point], base.nll, origin, {layer: holders[layer] for layer in plan.layers}, kept)


def keep_answers(
    learn: Questions,
    check: Questions,
    work: Work,
    allowed: Sequence[int],
    promised: float,
    *,
    overlap: bool = False,
    blind: Collection[int] = (),
) -> tuple[Plan, Kept]:
    """The plan that saves most of what keeps the share `promised` of the answers, and what it kept.

    `learn` chooses heads and layers, `check` thresholds; the result is measured on `check`. `allowed` are the layers
    that can prune; up to each of them, a layer is not in `blind`, whose heads do not see all of a prompt. With
    `overlap`, the words of the question may count. Raises InputError if the model answers too few questions, or if no
    setting keeps its promise.
    """
    layers = range(max(allowed) + 1)
    learned, right_learned = learn.see(layers)
    checked, right_checked = check.see(layers)
    n_right, n_asked = int(right_learned.sum() + right_checked.sum()), len(learned) + len(checked)
    if right_checked.sum() < _FEWEST or right_learned.sum() < _FEWEST:
        raise InputError(
            f"the model answers only {n_right} of {n_asked} questions about planted facts; too few to know what "
            "pruning costs; choose a share of the work with --share"
        )
    answered = [seen for seen, right in zip(checked, right_checked, strict=True) if right]
    cuts = _cuts(learned, answered, work, allowed, overlap, blind)
    for step in _STEPS:
        plan = with_thresholds(cuts, answered, step)
        alive = [survivors(seen, plan) for seen in answered]
        if np.mean([kept[list(seen.value)].all() for kept, seen in zip(alive, answered, strict=True)]) < _SURE:
            continue
        unpruned, pruned = check.ask([OFF, plan.spec()])
        kept = _kept(check, work, unpruned, pruned, promised)
        if kept.saving < _SAVING:
            raise InputError(
                f"a setting that keeps {promised:.0%} of the answers would save only {kept.saving:.0%} of the work; "
                "choose a share of the work with --share"
            )
        if kept.share >= promised + _CAUTION * (1 - promised):
            return plan, kept
    raise InputError(
        f"no setting keeps {promised:.0%} of what the model could answer; promise less with --answers, or choose a "
        "share of the work with --share"
    )


def _kept(check: Questions, work: Work, unpruned: Answers, pruned: Answers, promised: float) -> Kept:
    kinds = tuple(dict.fromkeys(prompt.kind for prompt in check.prompts))
    of_kind = [np.array([prompt.kind == kind for prompt in check.prompts]) for kind in kinds]

    def counts(chosen: NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(int((chosen & kind).sum()) for kind in of_kind)

    return Kept(
        kinds,
        counts(np.ones(len(check.prompts), bool)),
        counts(unpruned.right),
        counts(unpruned.right & pruned.right),
        promised,
        work.saving(pruned.left),
        float(unpruned.seconds.sum() / pruned.seconds.sum()),
    )


def _cuts(
    learned: Sequence[Seen],
    checked: Sequence[Seen],
    work: Work,
    allowed: Sequence[int],
    overlap: bool,
    blind: Collection[int],
) -> Plan:
    """The layers to prune after and their heads; thresholds are 0.

    The main layer is the first that can leave out most of a prompt. An earlier, generous cut and a later, harder one
    are added if they save enough. Earlier than a sixth of the depth, heads know little but which words are the same.
    """
    bare = Plan((), _SCORE.name, _SCORE.keep, _SCORE.reach)
    of_layer: dict[int, Heads] = {}
    stay: dict[int, float] = {}  # the share of a prompt that must stay
    for layer in allowed:
        plain = Heads(choose_heads(learned, layer, bare, HEADS_PER_LAYER, blind))
        words = [replace(plain, tail=learned[0].tail)] if overlap else []
        found = {chosen: _stay(checked, chosen, bare) for chosen in (plain, *words)}
        of_layer[layer] = min(found, key=found.__getitem__)
        stay[layer] = found[of_layer[layer]]
    deep = [layer for layer in allowed if layer >= work.n_layer / 6] or list(allowed)
    few = (layer for layer in deep if stay[layer] <= _MAIN)
    main = next(few, max(deep, key=lambda layer: (1 - stay[layer]) * work.worth(layer)))
    # One setting of a call says whether the words of the question count.
    tail = of_layer[main].tail

    def more(layers: Sequence[int], saved: dict[int, float]) -> list[int]:
        best = max(layers, key=saved.__getitem__, default=None)
        return [best] if best is not None and saved[best] >= _WORTH_IT else []

    before = [layer for layer in deep if layer < main - 1]
    after = [layer for layer in deep if layer > main + 1]
    early = {layer: (1 - stay[layer]) * (work.worth(layer) - work.worth(main)) for layer in before}
    late = {layer: (stay[main] - stay[layer]) * work.worth(layer) for layer in after}
    chosen = sorted([*more(before, early), main, *more(after, late)])
    return replace(
        bare,
        thresholds=tuple((layer, 0.0) for layer in chosen),
        heads=tuple(replace(of_layer[layer], tail=tail) for layer in chosen),
    )


def _stay(prompts: Sequence[Seen], chosen: Heads, plan: Plan) -> float:
    """The share of a prompt that must stay to keep the value in 95% of the prompts."""
    shares = []
    for seen in prompts:
        candidates = seen.candidates(plan.keep)
        shares.append(needed(importance(seen, chosen, plan.reach, candidates), seen.value, candidates))
    return float(np.quantile(shares, 0.95))


def with_thresholds(cuts: Plan, prompts: Sequence[Seen], step: float) -> Plan:
    """The plan with thresholds at which each cut loses the share `step` of the values, less a margin."""
    plan = replace(cuts, thresholds=(), heads=())
    for (layer, _), chosen in zip(cuts.thresholds, cuts.heads, strict=True):
        least = []
        for seen in prompts:
            candidates = seen.candidates(plan.keep) & survivors(seen, plan)
            asked = [token for token in seen.value if candidates[token]]
            if asked:
                least.append(importance(seen, chosen, plan.reach, candidates)[asked].min())
        limit = _MARGIN * float(np.quantile(least, step)) if least else 0.0
        plan = replace(
            plan, thresholds=(*plan.thresholds, (layer, float(np.float32(limit)))), heads=(*plan.heads, chosen)
        )
    return plan
