"""Logits and greedy text of one model in llama.cpp and in transformers, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import agq_gguf
from agq_gguf.runtime.model import Batch, Model


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    with Model(path) as model, model.context(len(tokens), threads=1) as context:
        batch = Batch(tokens, first_logits=0)
        context.decode(batch)
        return context.logits(batch).copy()


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].float().numpy()
    return found


def greedy(next_logits: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, n: int) -> tuple[list[int], float]:
    """The n likeliest tokens one after the other, and by how much the closest of these choices was made."""
    margins = []
    for _ in range(n):
        last = next_logits(tokens)[-1]
        second, first = np.argsort(last)[-2:]
        margins.append(last[first] - last[second])
        tokens = np.append(tokens, np.int32(first))
    return [int(token) for token in tokens[-n:]], float(min(margins))


def pruned_logits(path: Path, tokens: np.ndarray, prune: str) -> tuple[np.ndarray, int]:
    """Logits of the last token of a prompt, and how many of its tokens were dropped on the way."""
    with agq_gguf.options(prune=prune), Model(path) as model, model.context(len(tokens), threads=1) as context:
        batch = Batch(tokens)
        context.decode(batch)
        dropped = sum(layer >= 0 for layer in agq_gguf.last_pruned()) if prune != "off" else 0
        return context.logits(batch)[0].copy(), dropped
