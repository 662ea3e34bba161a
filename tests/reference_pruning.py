"""Token pruning by the definition: a forward from which tokens are physically removed, call by call.

What docs/pruning.md promises, written down once more with nothing of the plugin: a call (a ubatch) runs through the
layers; behind the attention of a pruning layer the least important of its tokens leave, and take part in nothing
afterwards, neither in this call nor, as keys and values, in later ones. The K/V cache of each layer holds only the
tokens that were there.

With the score `heads`, tokens are kept as they are behind the attention of the first pruning layer. A call without
outputs ends there. A later call chooses among its own tokens and those that waited, and with a threshold also among
those that an earlier call has dropped; with a share, if `revive` says how many of these return.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from reference_model import Array, ReferenceModel

RECENT_QUERIES = 8
OBSERVERS = 16  # of the score `heads`


@dataclass(frozen=True)
class Rule:
    """What a pruning layer drops: a share of its tokens, or those below a threshold."""

    share: float | None = None
    threshold: float | None = None
    keep: int = 0  # the last so many tokens of a call stay
    reach: int = 0  # a token counts as much as the best one at most so many places away
    reuse: bool = False  # later layers get keys and values of dropped tokens from the state in which they left
    direction: Array | None = None  # of the score `learned`
    heads: tuple[tuple[int, int], ...] = ()  # of the score `heads`: (layer, head)
    tail: int | None = None  # the same: tokens behind the question, whose words count
    revive: float = 0.0  # with a share: what a later question brings back, as a share of the tokens in front of it


@dataclass
class _Cache:
    """Keys and values of one layer, [cells, heads, head size], and the positions of their tokens."""

    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    positions: list[NDArray[np.int64]] = field(default_factory=list)


def sees(query_positions: NDArray[np.int64], positions: NDArray[np.int64], window: int) -> NDArray[np.bool_]:
    """Which cells [cells] each query [T] sees; `window` as in `ReferenceModel.window`."""
    distance = query_positions[:, None] - positions[None, :]
    seen: NDArray[np.bool_] = (distance >= 0) & ((distance < window) if window else True)
    return seen


def importance(
    weights: Array, query_positions: NDArray[np.int64], positions: NDArray[np.int64], score: str, window: int = 0
) -> Array:
    """Importance [T] of the T tokens of a call from its attention weights [heads, T, cells].

    The last T cells are the call's own tokens; `positions` are those of all cells. NaN for a token in a window that no
    later one sees.
    """
    tokens, cells = weights.shape[1:]
    own = weights.mean(0)[:, cells - tokens :]  # [query, token]
    seen = sees(query_positions, positions, window)
    visible = seen.sum(1)  # of each query
    if score == "first":
        first = np.flatnonzero(positions == 0)
        result: Array = weights.mean(0)[:, first].sum(1)
        return result
    if score == "received":
        later = np.tril(np.ones((tokens, tokens)), -1) * seen[:, cells - tokens :]  # query behind the token
        received, evenly = (own * later).sum(0), (later / visible[:, None]).sum(0)
        return np.where(evenly > 0, received / np.maximum(evenly, 1e-30), np.nan if window else 0)
    if score == "recent":
        result = (own * visible[:, None])[-RECENT_QUERIES:].mean(0)
        return result
    raise ValueError(score)


def learned(states: Array, direction: Array) -> Array:
    """Importance [T] by the score `learned` of states [T, E] behind an attention."""
    result: Array = np.exp(states @ direction / np.sqrt(np.square(states).mean(-1)))
    return result


def observed(weights: Array, n_own: int) -> Array:
    """[heads, cells]: the largest weight that the last of the `n_own` tokens of a call give each cell."""
    result: Array = weights[:, -min(OBSERVERS, n_own) :].max(1)
    return result


def overlap(tokens: list[int], tail: int) -> Array:
    """By token: 1 / (how often it stands in front of the question) if it is also in the question, smoothed."""
    end = max(0, len(tokens) - tail)
    body, question = tokens[: max(0, end - 24)], tokens[max(0, end - 24) : end]
    value = np.array([1 / body.count(t) if t in question else 0.0 for t in body] + [0.0] * (len(tokens) - len(body)))
    result: Array = np.array([value[max(0, i - 32) : i + 33].sum() / 65 for i in range(len(tokens))])
    return result


def shares(measures: list[tuple[Array, int]], protected: NDArray[np.bool_], n_tokens: int) -> Array:
    """The mean over measures (values [T], reach) of what each token has of the sum, where 1 is the average."""
    total = np.zeros(len(protected))
    for values, reach in measures:
        open_ = np.where(protected, 0, values)
        best = np.array([open_[max(0, t - reach) : t + reach + 1].max() for t in range(len(open_))])
        best[protected] = 0
        total += best / best.sum() / len(measures)
    return total * n_tokens


def always_kept(score: str) -> int:
    """How many of the last tokens of a call a score protects by itself."""
    return {"first": 0, "learned": 0, "received": 1, "recent": RECENT_QUERIES, "heads": OBSERVERS}[score]


def choose(values: Array, rule: Rule, protected: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which tokens are dropped [T], from their importance; those with NaN stay."""
    candidates = ~protected & ~np.isnan(values)
    known = np.nan_to_num(values, nan=-np.inf)
    values = np.array([known[max(0, t - rule.reach) : t + rule.reach + 1].max() for t in range(len(values))])
    if rule.threshold is not None:
        return candidates & (values.astype(np.float32) < np.float32(rule.threshold))
    assert rule.share is not None
    order = [int(t) for t in np.argsort(values, kind="stable") if candidates[t]]
    dropped = np.zeros(len(values), bool)
    dropped[order[: int(np.floor(rule.share * len(values) + 0.5))]] = True
    return dropped


def choose_returning(
    values: Array, rule: Rule, protected: NDArray[np.bool_], returns: NDArray[np.bool_], n_before: int, is_last: bool
) -> NDArray[np.bool_]:
    """`choose`, where the tokens `returns` [T] were dropped by an earlier call: a share counts the others only.

    The best of those return: at the last cut as many as `rule.revive` of the `n_before` tokens in front of the call.
    """
    if rule.threshold is not None or not rule.revive:
        return choose(values, rule, protected)
    dropped = np.zeros(len(values), bool)
    dropped[~returns] = choose(values[~returns], rule, protected[~returns])
    ranked = sorted(np.flatnonzero(returns).tolist(), key=lambda t: float(values[t]))
    wanted = int(np.floor(rule.revive * n_before + 0.5))
    n_lost = max(0, len(ranked) - wanted)
    assert rule.share is not None
    if not is_last:
        n_lost = min(n_lost, int(np.floor(rule.share * len(ranked) + 0.5)))
    dropped[ranked[:n_lost]] = True
    return dropped


class PrunedReference:
    """One sequence of a model: its caches, and calls that extend it."""

    def __init__(self, model: ReferenceModel, rules: dict[int, Rule], score: str, shortest: int = 64):
        self.model, self.rules, self.score, self.shortest = model, rules, score, shortest
        self.caches = [_Cache() for _ in range(model.n_layer)]
        self.n_past = 0
        self.seen: dict[tuple[int, int], Array] = {}  # of the last call, by layer and head: `observed`, by token
        self.left_behind: NDArray[np.int64] = np.empty(0, np.int64)  # of the last call: layer of each token, or -1
        self.layers: dict[int, int] = {}  # the same by position, of all calls
        heads = bool(rules) and all(r.heads and not r.reuse for r in rules.values())
        self.first = min(rules) if heads and min(rules) > 0 else None  # behind it tokens are kept
        self.kept: dict[int, tuple[Array, int]] = {}  # by position: state and id
        self.waiting: set[int] = set()  # positions that no question has seen

    def run(self, tokens: list[int], outputs: list[int] | None = None) -> Array:
        """Logits [outputs, vocabulary] of the tokens with these indices of the call; None: of the last one."""
        m = self.model
        outputs = [len(tokens) - 1] if outputs is None else outputs
        n_own = len(tokens)
        own_positions = np.arange(self.n_past, self.n_past + n_own)
        early = self._candidates(n_own) if outputs else []
        positions = np.concatenate([np.array(early, np.int64), own_positions])
        everything = [self.kept[p][1] for p in early] + list(tokens)
        self.n_past += n_own
        n_early, n_all = len(early), len(everything)
        here = np.arange(n_early, n_all)  # indices of the tokens that are still there
        left_behind = np.full(n_all, -1)
        protected = np.isin(np.arange(n_all), n_early + np.array(outputs, int)) | (positions == 0)
        waited = any(p in self.waiting for p in early)
        prunes = n_own + len(self.waiting.intersection(early)) >= self.shortest or (bool(early) and not waited)
        prunes = prunes and n_own > 1
        of_prompt = np.isin(positions, [*self.waiting, *own_positions.tolist()])  # the others were dropped before
        if n_own < self.shortest and not waited:
            protected[n_early:] = True
        self.seen = {}
        x = m.embed(tokens)
        gone: list[tuple[Array, NDArray[np.int64]]] = []  # states and positions of tokens that are used again
        for i in range(m.n_layer):
            block = f"blk.{i}"
            for state, old in gone:
                self._store(m.norm(state, f"{block}.attn_norm.weight"), i, old)
            mixed, weights = self._attention(m.norm(x, f"{block}.attn_norm.weight"), i, positions[here])
            x = x + mixed
            cells = np.concatenate(self.caches[i].positions)
            column = {p: c for c, p in enumerate(cells.tolist())}
            alive = here if self.first is None or i > self.first else np.arange(n_all)
            columns = [column[p] for p in positions[alive].tolist()]
            for head, largest in enumerate(observed(weights, int((here >= n_early).sum()))):
                self.seen[i, head] = np.zeros(n_all)
                self.seen[i, head][alive] = largest[columns]
            if i == self.first:
                self.kept.update({p: (s, t) for p, s, t in zip(own_positions.tolist(), x, tokens, strict=True)})
                if not outputs:
                    self.waiting.update(own_positions.tolist())
                    return np.empty((0, 0))
                x = np.concatenate([*(self.kept[p][0][None] for p in early), x])
                here = np.arange(n_all)
            if i in self.rules and prunes:
                rule = self.rules[i]
                kept = n_all - max(rule.keep, always_kept(self.score))
                stays = protected[here] | ((here >= kept) & of_prompt[here])
                if rule.direction is not None:
                    values = learned(x, rule.direction)
                elif rule.heads:
                    measures = [(self.seen[head][here], rule.reach) for head in rule.heads]
                    if rule.tail is not None:
                        measures.append((overlap(everything, rule.tail)[here], 0))
                    values, rule = shares(measures, stays, n_all), replace(rule, reach=0)
                else:
                    values = importance(weights, positions[here], cells, self.score, m.window(i))
                n_before = self.n_past - n_own - len(self.waiting)
                dropped = choose_returning(values, rule, stays, ~of_prompt[here], n_before, i == max(self.rules))
                left_behind[here[dropped]] = i
                if self.rules[i].reuse and dropped.any():
                    gone.append((x[dropped], positions[here[dropped]]))
                x, here = x[~dropped], here[~dropped]
            x = x + m.feed_forward(x, block)
        self.left_behind = left_behind[n_early:]
        self.layers.update(zip(positions.tolist(), left_behind.tolist(), strict=True))
        self.waiting.difference_update(early)
        x = m.norm(x[np.isin(here, n_early + np.array(outputs))], "output_norm.weight")
        return m.linear(x, "output.weight" if "output.weight" in m.tensors else "token_embd.weight")

    def _candidates(self, n_own: int) -> list[int]:
        """Positions of earlier tokens that a call may compute behind the first pruning layer."""
        if self.first is None:
            return []
        there = set(np.concatenate([*self.caches[-1].positions, np.empty(0, np.int64)]).tolist())
        rule = self.rules[self.first]
        revives = n_own > 1 and (rule.threshold is not None or rule.revive > 0)
        return sorted(p for p in self.kept if p not in there and (revives or p in self.waiting))

    def _store(self, x: Array, layer: int, positions: NDArray[np.int64]) -> None:
        """Keys and values of these tokens; extends the cache."""
        m, block, cache = self.model, f"blk.{layer}", self.caches[layer]
        for i, old in enumerate(cache.positions):  # a token may be computed once more
            stays = ~np.isin(old, positions)
            cache.positions[i] = old[stays]
            cache.keys[i], cache.values[i] = cache.keys[i][stays], cache.values[i][stays]
        cache.keys.append(m.rope(m.project(x, block, "k", m.n_kv), positions))
        cache.values.append(m.project(x, block, "v", m.n_kv))
        cache.positions.append(positions)

    def _attention(self, x: Array, layer: int, positions: NDArray[np.int64]) -> tuple[Array, Array]:
        """Output [T, E] and attention weights [heads, T, cells] of the tokens at these positions; extends the cache."""
        m, block, tokens = self.model, f"blk.{layer}", len(x)
        cache = self.caches[layer]
        q = m.rope(m.project(x, block, "q", m.n_head), positions)
        self._store(x, layer, positions)
        repeat = m.n_head // m.n_kv
        k, v = (np.repeat(np.concatenate(t), repeat, axis=1) for t in (cache.keys, cache.values))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores[:, ~sees(positions, np.concatenate(cache.positions), m.window(layer))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(tokens, -1)
        return m.from_attention(mixed, block), weights
