"""Plans for token pruning: their content, what they save, and thresholds that drop a given number of tokens.

Pure functions of arrays. `pruning/search.py` chooses a plan, cpp/prune runs it, and docs/pruning.md explains it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.format import pruning_record
from agq_gguf.gguf_io.tensor_names import is_further_prediction, layer_of

STAYED = -1  # never dropped, in arrays of the layers after which tokens were dropped
MIN_PROMPT = 64  # tokens; the runtime does not prune shorter calls


@dataclass(frozen=True)
class Plan:
    """Which tokens of a prompt are dropped: after each of these layers, those with importance below its threshold."""

    thresholds: tuple[tuple[int, float], ...]  # (layer, threshold), layers ascending
    score: str = "recent"  # one of pruning_record.SCORES
    keep: int = 0  # the last N tokens of a call are never dropped
    reach: int = 0  # each token gets the highest importance within N places
    reuse: bool = (
        False  # later layers still get keys and values of dropped tokens, from the state when they were dropped
    )
    heads: tuple[pruning_record.Heads, ...] = ()  # of the score `heads`: for each layer, all with the same tail

    @property
    def layers(self) -> tuple[int, ...]:
        """The pruning layers."""
        return tuple(layer for layer, _ in self.thresholds)

    def spec(self, probed: Iterable[int] = (), directions: Mapping[int, pruning_record.Direction] | None = None) -> str:
        """The plan as text for `agq_gguf.options(prune=...)` and the variable AGQ_PRUNE.

        `probed` are further layers where the runtime computes importance but drops nothing. `directions` of layers are
        those of a learned score that the file does not have yet.
        """
        rules = dict.fromkeys(probed, "t0") | {layer: f"t{value:.9g}" for layer, value in self.thresholds}
        if not rules:
            return "off"
        listed = ",".join(f"{layer}:{rule}" for layer, rule in sorted(rules.items()))
        known = {layer: direction for layer, direction in (directions or {}).items() if layer in rules}
        given = [f";direction={layer}:{direction.to_bytes().hex()}" for layer, direction in known.items()]
        given += [
            f";heads={layer}:{chosen.spec()}" for layer, chosen in zip(self.layers, self.heads, strict=bool(self.heads))
        ]
        if self.heads and self.heads[0].tail is not None:
            given.append(f";overlap={self.heads[0].tail}")
        settings = f";score={self.score};keep={self.keep};reach={self.reach}" + (";reuse=1" if self.reuse else "")
        return listed + settings + "".join(given)

    def records(self) -> dict[int, pruning_record.Pruning]:
        """The record of each pruning layer."""
        heads = self.heads or (None,) * len(self.thresholds)
        return {
            layer: pruning_record.Pruning(self.score, value, self.keep, self.reach, self.reuse, heads=chosen)
            for (layer, value), chosen in zip(self.thresholds, heads, strict=True)
        }


@dataclass(frozen=True)
class Work:
    """The work of a prompt's tokens in the layers of a model.

    It counts the weights that a token is multiplied with. It does not count attention itself, which shrinks faster.
    """

    n_layer: int
    ffn_share: float  # share of a layer's weights that are used after its attention
    again: float = 0.0  # share of a layer's weights that dropped tokens still use

    def worth(self, layer: int) -> float:
        """Share of a token's whole work that is saved if it is dropped after the attention of this layer."""
        return ((self.n_layer - layer - 1) * (1 - self.again) + self.ffn_share) / self.n_layer

    def saving(self, left: Sequence[NDArray[np.int32]]) -> float:
        """Share of the work of prompts that was saved.

        `left` has an array for each prompt: the layer after which each token was dropped, or -1.
        """
        tokens = sum(len(layers) for layers in left)
        saved = sum(
            self.worth(int(layer)) * int(count)
            for layers in left
            for layer, count in zip(*np.unique(layers, return_counts=True), strict=True)
            if layer != STAYED
        )
        return saved / max(tokens, 1)


def work_of(sizes: dict[str, int], reuse: bool = False) -> Work:
    """The work of a model, from the names and sizes (elements) of its tensors. Layers are called ``blk.N``.

    Blocks that predict further tokens (``blk.N.nextn.*``) do not count: llama.cpp runs them apart from the others.
    With `reuse`, dropped tokens still need the products for keys and values. Raises ValueError if there are no layers.
    """
    per_layer = {name: layer for name in sizes if (layer := layer_of(name)) is not None}
    apart = {layer for name, layer in per_layer.items() if is_further_prediction(name)}
    per_layer = {name: layer for name, layer in per_layer.items() if layer not in apart}
    if not per_layer:
        raise ValueError("no tensor is called blk.N.*")
    ffn = sum(sizes[name] for name in per_layer if ".ffn" in name)
    total = sum(sizes[name] for name in per_layer)
    again = sum(sizes[name] for name in per_layer if re.search(r"\.attn_(k|v|qkv)\.", name)) if reuse else 0
    return Work(max(per_layer.values()) + 1, ffn / total, again / total)


def droppable(importance: Sequence[NDArray[np.float32]]) -> int:
    """How many tokens could be dropped, given their importance (NaN: already dropped, infinite: protected)."""
    return sum(int(np.isfinite(values).sum()) for values in importance)


def threshold_for(importance: Sequence[NDArray[np.float32]], n_drop: int) -> float:
    """The threshold (a binary32 value) below which `n_drop` tokens of all prompts fall, or as many as possible.

    `importance` has an array for each prompt, with NaN for dropped tokens and infinity for protected ones.
    """
    values = np.sort(np.concatenate([values[np.isfinite(values)] for values in importance]).astype(np.float32))
    if n_drop <= 0 or not len(values):
        return 0.0
    if n_drop >= len(values):
        return float(np.nextafter(values[-1], np.float32(np.inf)))
    return float(values[n_drop])


def overlooked(importance: dict[int, list[NDArray[np.float32]]], layer: int, n_drop: int) -> float:
    """How important `n_drop` tokens dropped after this layer would be to later layers: 0 to 1.

    This is the highest importance of a dropped token divided by the highest importance of all tokens, averaged over
    later layers and prompts. It reveals layers that do not yet attend to the tokens that matter later, without any run.
    """
    border = threshold_for(importance[layer], n_drop)
    missed = [
        values[gone].max(initial=0) / max(values[np.isfinite(values)].max(initial=0), np.finfo(np.float32).tiny)
        for later in importance
        if later > layer
        for values, own in zip(importance[later], importance[layer], strict=True)
        for gone in [(own < np.float32(border)) & np.isfinite(values)]
    ]
    return float(np.mean(missed)) if missed else 0.0


def single_layers(
    work: Work, saving: float, allowed: Sequence[int], most: float, count: int, missed: Callable[[int], float]
) -> list[int]:
    """Up to `count` layers, spread over the model, that can save `saving` by dropping at most a share `most` of tokens.

    Among neighbouring layers it takes the one with the lowest `missed`.
    """
    able = [layer for layer in allowed if saving <= most * work.worth(layer)]
    if len(able) <= count:
        return able
    zones = (able[len(able) * i // count : len(able) * (i + 1) // count] for i in range(count))
    return [min(zone, key=missed) for zone in zones]


def split_saving(work: Work, layers: Sequence[int], parts: Sequence[float], saving: float) -> list[float]:
    """Share of all tokens to drop after each layer, so that layer i contributes the share `parts[i]` of the saving."""
    total = math.fsum(parts)
    return [saving * part / total / work.worth(layer) for layer, part in zip(layers, parts, strict=True)]
