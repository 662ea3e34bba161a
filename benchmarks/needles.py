"""Needle-in-a-haystack tasks for chat models: facts at random places of a long text, and a question about one of them.

The text consists of sentences of a file, without repetition. The reply is right if each token of the answer is the most
likely one after the given beginning of the reply. This gives the same result as greedy decoding with one call instead
of many. Used by prune_figures.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq_gguf.runtime.model import Model

NAMES = [
    "Alice", "Robert", "Maria", "Henry", "Julia", "Thomas", "Clara", "Peter", "Laura", "Oscar",
    "Emma", "Victor", "Nora", "Simon", "Helen", "Martin", "Diana", "Walter", "Rosa", "Felix",
]  # fmt: skip
CITIES = [
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Chicago", "Boston", "Moscow",
    "Cairo", "Dublin", "Athens", "Lisbon", "Oslo", "Prague", "Sydney", "Toronto", "Houston", "Dallas",
]  # fmt: skip

# For each kind of fact: the sentence, the question, and the beginning of the reply.
KINDS = {
    "code": ("The secret code of {0} is {1}.", "What is the secret code of {0}?", "The secret code of {0} is"),
    "city": ("{0} lives in the city of {1}.", "In which city does {0} live?", "{0} lives in the city of"),
}


@dataclass(frozen=True)
class Needle:
    """A prompt that ends with the first words of the reply, and the right continuation."""

    prompt: NDArray[np.int32]
    answer: NDArray[np.int32]


def sentences_of(path: Path) -> list[str]:
    """Whole sentences of a text, without those that have digits, quotation marks or similarity to a fact."""
    text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8", errors="replace"))
    found = re.split(r"(?<=[.!?]) ", text)
    return [s for s in found if 30 < len(s) < 200 and not re.search(r"[\d\"'<>@=]| lives? | code ", s)]


def make_needles(
    model: Model, text: Path, seed: int, count: int, tokens: tuple[int, int], facts: int, kind: str
) -> list[Needle]:
    """Tasks for a model whose vocabulary has the special tokens of ChatML."""
    fact, question, reply = KINDS[kind]
    sentences = sentences_of(text)
    dice = random.Random(seed)
    lengths = [len(model.tokenize(s, add_special=False)) for s in sentences]
    needles = []
    for _ in range(count):
        names = dice.sample(NAMES, facts)
        values = dice.sample(CITIES, facts) if kind == "city" else [str(dice.randint(1000, 9999)) for _ in names]
        wanted = dice.randint(*tokens) - 60 - 15 * facts  # for the frame and the facts
        at = dice.randrange(len(sentences) - 200)
        body: list[str] = []
        length = 0
        while length < wanted:
            body.append(sentences[at + len(body)])
            length += lengths[at + len(body) - 1]
        for name, value in zip(names, values, strict=True):
            body.insert(dice.randrange(1, len(body)), fact.format(name, value))
        prompt = _chat(f"{' '.join(body)}\n\n{question.format(names[0])}", reply.format(names[0]))
        needles.append(
            Needle(model.tokenize(prompt, parse_special=True), model.tokenize(f" {values[0]}", add_special=False))
        )
    return needles


def _chat(user: str, reply: str) -> str:
    """A conversation up to the first words of the reply."""
    turns: Sequence[tuple[str, str]] = (("system", "You are a helpful assistant."), ("user", user))
    return "".join(f"<|im_start|>{who}\n{what}<|im_end|>\n" for who, what in turns) + f"<|im_start|>assistant\n{reply}"
