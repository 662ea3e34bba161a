"""Which attention heads find what a question asks for, and how much of a prompt must stay for that.

Pure functions of arrays, for the score `heads` (docs/pruning.md, "Scores"). `shares` and `word_overlap` compute what
cpp/scores/heads.cpp computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from agq_gguf.format.pruning_record import Heads
from agq_gguf.pruning.plan import Plan

_QUESTION, _OVERLAP_REACH = 24, 32  # tokens; as in cpp/scores/heads.cpp
_CANDIDATES = 24  # heads that are tried together: the best ones alone
_LEAST = 0.03  # a head that needs less of a prompt than this is good enough; smaller shares are noise

Bools = NDArray[np.bool_]
Head = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class Seen:
    """A prompt with a known answer, and what every head paid attention to while nothing was dropped."""

    tokens: NDArray[np.int32]  # [T]
    value: tuple[int, ...]  # the tokens that spell the answer
    tail: int  # tokens behind the question
    weights: NDArray[np.float16]  # [layers, heads, T]: the highest weight from the last 16 tokens

    def candidates(self, keep: int) -> Bools:
        """Which tokens [T] may be dropped: all but the first and the last `keep`."""
        at = np.arange(len(self.tokens))
        return (at > 0) & (at < len(at) - keep)


def word_overlap(tokens: NDArray[np.int32], tail: int) -> NDArray[np.float32]:
    """By token [T]: 1 / n if it occurs n times before the question and in the question, averaged over 65 neighbours."""
    n = len(tokens)
    end = max(0, n - tail)
    begin = max(0, end - _QUESTION)
    _, place, counts = np.unique(tokens[:begin], return_inverse=True, return_counts=True)
    value = np.zeros(n)
    value[:begin] = np.isin(tokens[:begin], tokens[begin:end]) / counts[place]
    before = np.concatenate([[0.0], value.cumsum()])
    at = np.arange(n)
    windows = before[np.minimum(n, at + _OVERLAP_REACH + 1)] - before[np.maximum(0, at - _OVERLAP_REACH)]
    return (windows / (2 * _OVERLAP_REACH + 1)).astype(np.float32)


def shares(values: NDArray[np.floating], reach: int, candidates: Bools) -> NDArray[np.float32]:
    """What each token has of the sum over all candidates, for measures [..., T]; 0 for others.

    Each token first gets the highest value of a candidate within `reach` places.
    """
    counted = np.where(candidates, values, 0).astype(np.float32)
    edges = [(0, 0)] * (counted.ndim - 1) + [(reach, reach)]
    best = sliding_window_view(np.pad(counted, edges), 2 * reach + 1, axis=-1).max(-1)
    best = np.where(candidates, best, 0)
    sums = best.sum(-1, keepdims=True)
    result: NDArray[np.float32] = np.divide(best, sums, out=np.zeros_like(best), where=sums > 0)
    return result


def importance(seen: Seen, chosen: Heads, reach: int, candidates: Bools) -> NDArray[np.float32]:
    """The importance [T] by the score `heads`, as the runtime computes it; 0 for tokens that are no candidates."""
    layers, heads = np.array(chosen.heads).T
    total = shares(seen.weights[layers, heads], reach, candidates).sum(0)
    n = len(chosen.heads)
    if chosen.tail is not None:
        total, n = total + shares(word_overlap(seen.tokens, chosen.tail), 0, candidates), n + 1
    result: NDArray[np.float32] = total / n * len(seen.tokens)
    return result


def survivors(seen: Seen, plan: Plan) -> Bools:
    """Which tokens [T] are still there after all cuts of a plan, as far as the weights without cuts tell."""
    alive, protected = np.ones(len(seen.tokens), bool), ~seen.candidates(plan.keep)
    for (_, limit), chosen in zip(plan.thresholds, plan.heads, strict=True):
        alive &= protected | (importance(seen, chosen, plan.reach, alive & ~protected) >= np.float32(limit))
    return alive


def needed(score: NDArray[np.floating], value: Sequence[int], candidates: Bools) -> float:
    """The share of the candidates that must stay to keep the value, if the best ones by this score [T] stay."""
    asked = [token for token in value if candidates[token]]
    return float((score[candidates] >= score[asked].min()).mean()) if asked else 0.0


def choose_heads(
    prompts: Sequence[Seen], layer: int, plan: Plan, count: int, blind: Collection[int] = ()
) -> tuple[Head, ...]:
    """The up to `count` heads of layers up to `layer` by which the least of the prompts must stay, on average.

    Heads of the layers in `blind` are not looked at.

    One after the other, out of those that are best alone; a head that does not help is left out.
    """
    may_leave = [seen.candidates(plan.keep) for seen in prompts]
    of_heads = [
        shares(seen.weights[: layer + 1], plan.reach, candidates)
        for seen, candidates in zip(prompts, may_leave, strict=True)
    ]
    n_heads = prompts[0].weights.shape[1]

    def cost(scores: list[NDArray[np.float32]]) -> float:
        found = zip(scores, prompts, may_leave, strict=True)
        return float(np.mean([max(needed(score, seen.value, leave), _LEAST) for score, seen, leave in found]))

    def heads_of(index: int) -> Head:
        return index // n_heads, index % n_heads

    seeing = [i for i in range((layer + 1) * n_heads) if heads_of(i)[0] not in blind]
    alone = [cost([values[heads_of(i)] for values in of_heads]) for i in seeing]
    candidates = [heads_of(seeing[int(i)]) for i in np.argsort(alone, kind="stable")[:_CANDIDATES]]
    chosen: list[Head] = []
    total = [np.zeros(len(seen.tokens), np.float32) for seen in prompts]
    lowest = np.inf
    while len(chosen) < min(count, len(candidates)):
        tried = [
            (cost([t + values[head] for t, values in zip(total, of_heads, strict=True)]), head)
            for head in candidates
            if head not in chosen
        ]
        least, head = min(tried)
        if least >= lowest:
            break
        lowest = least
        chosen.append(head)
        total = [t + values[head] for t, values in zip(total, of_heads, strict=True)]
    return tuple(chosen)
