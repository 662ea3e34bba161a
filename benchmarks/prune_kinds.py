"""Kinds of prompts for prune_tasks.py beyond the three that calibration uses (agq_gguf/pruning/planted.py)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError
from agq_gguf.pruning import planted
from agq_gguf.pruning.facts import CITIES, Fact, facts_of_one_kind, two_facts
from agq_gguf.pruning.planted import Chat, Letters, Planted, in_prose, plant
from agq_gguf.runtime.model import Model

FOLLOWING = 64  # tokens whose likelihood is measured after a prompt of prose
ITEMS = (
    "bread", "milk", "butter", "cheese", "apples", "onions", "potatoes", "carrots", "tomatoes", "rice", "pasta",
    "flour", "sugar", "salt", "pepper", "honey", "tea", "coffee", "eggs", "yogurt", "bananas", "oranges", "grapes",
    "lemons", "mushrooms", "spinach", "chicken", "salmon", "soap", "candles",
)  # fmt: skip
ROLES = {  # a word for a person, and what this person does, in other words
    "baker": "makes bread", "pilot": "flies planes", "dentist": "treats teeth", "farmer": "grows crops",
    "teacher": "works with pupils", "judge": "presides over trials", "photographer": "takes pictures",
    "librarian": "looks after books", "plumber": "repairs pipes", "tailor": "makes suits", "mechanic": "repairs cars",
    "lawyer": "defends the accused", "nurse": "cares for the sick", "gardener": "waters the flowers",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A prompt, what is read after it in calls of their own, and the tokens to be predicted; token ids."""

    prompt: NDArray[np.int32]
    read: tuple[NDArray[np.int32], ...]  # the last one is followed by the answer
    answer: NDArray[np.int32]
    value: tuple[int, ...]  # indices of the prompt's tokens that the answer depends on

    @classmethod
    def of(cls, found: Planted) -> Task:
        """The task of a prompt with a planted fact."""
        return cls(found.prompt, (found.reply,), found.answer, found.value)


class Tasks:
    """Makes the tasks of a model and a text."""

    def __init__(self, model: Model, prose: str, tokens: tuple[int, int]) -> None:
        """The prompts have `tokens` (minimum, maximum) tokens."""
        self._chat = Chat(model)
        self._sentences = planted.sentences_of(prose)
        self._text = model.tokenize(prose, add_special=False)
        self._tokens = tokens

    def task(self, kind: str, seed: int) -> Task:
        """The same one for the same kind and seed."""
        if kind in planted.KINDS:
            return Task.of(plant(self._chat.model, self._sentences, kind, seed, self._tokens))
        dice = random.Random(f"{kind} {seed}")
        return KINDS[kind](self, dice, dice.randint(*self._tokens))

    def _prose(
        self, dice: random.Random, target: int, facts: Sequence[str], question: str, *, first: bool = False,
        in_order: bool = False,
    ) -> str:  # fmt: skip
        def ask(body: str, question: str) -> str:
            return f"Read this text and answer a question: {question}\n\n{body}"

        return in_prose(
            self._chat, facts, question, self._sentences, dice, self._tokens, target,
            ask=ask if first else None, in_order=in_order,
        )  # fmt: skip

    def count(self, dice: random.Random, target: int) -> Task:
        """A numbered list whose items are to be counted."""
        items = dice.sample(ITEMS, dice.randint(3, 6))
        listed = "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
        text, question = f"\n\nShopping list:\n{listed}\n\n", "How many items are on the shopping list?"
        user, reply = self._prose(dice, target, [text], question), "The number of items on the shopping list is "
        return self._task(user, reply, str(len(items)), [(text, f"{i}. {item}") for i, item in enumerate(items, 1)])

    def list(self, dice: random.Random, target: int) -> Task:
        """A list that is to be told again."""
        items, reply = dice.sample(ITEMS, dice.randint(3, 6)), "The shopping list has "
        text = f"{reply}{', '.join(items)}."
        user = self._prose(dice, target, [text], "What is on the shopping list?")
        return self._task(user, reply, ", ".join(items), [(text, item) for item in items])

    def variables(self, dice: random.Random, target: int) -> Task:
        """Variables that are set to one another; the answer depends on each step of the chain."""
        number, other = (str(n) for n in dice.sample(range(11, 100), 2))
        steps = [f"x1 = {number}", "x2 = x1", "x3 = x2"]
        facts = [f"Line {i}: {step}." for i, step in enumerate([steps[0], f"y1 = {other}", *steps[1:], "y2 = y1"], 1)]
        user = self._prose(dice, target, facts, "What is the value of x3?", in_order=True)
        return self._task(
            user, "x3 = x2 = x1 = ", number, [(facts[i], step) for i, step in zip((0, 2, 3), steps, strict=True)]
        )

    def _task(self, user: str, reply: str, answer: str, needed: Sequence[tuple[str, str]]) -> Task:
        """A task whose answer depends on several parts of the prompt: each is a text, and the words in it."""
        prompt = self._chat.tokens(self._chat.prompt(user))
        letters = Letters(self._chat.model, prompt)
        value = {i for text, words in needed for i in letters.part(text, text.index(words), len(words))}
        given, predicted = self._chat.split(prompt, self._chat.said(user, reply), answer)
        return Task(prompt, (given,), predicted, tuple(sorted(value)))

    def question_first(self, dice: random.Random, target: int) -> Task:
        """As "needle", but the question comes before the text."""
        facts = two_facts(dice)
        user = self._prose(dice, target, [fact.text for fact in facts], facts[0].question, first=True)
        return Task.of(self._chat.planted("question-first", user, facts[0]))

    def paraphrase(self, dice: random.Random, target: int) -> Task:
        """A question that shares no word with the fact but "the"; there are two more facts. The reply has the word."""
        roles, cities = dice.sample(list(ROLES), 3), dice.sample(CITIES, 3)
        facts = [
            Fact(
                f"The {role} moved to ", city, " last spring.", f"Where does the person who {ROLES[role]} live now?",
                f"The {role} now lives in ",
            )
            for role, city in zip(roles, cities, strict=True)
        ]  # fmt: skip
        user = self._prose(dice, target, [fact.text for fact in facts], facts[0].question)
        return Task.of(self._chat.planted("paraphrase", user, facts[0]))

    def second(self, dice: random.Random, target: int) -> Task:
        """As "facts", with a second question about another fact after the first answer; only the second one counts."""
        facts = facts_of_one_kind(dice, 6)
        user = self._prose(dice, target, [fact.text for fact in facts], facts[0].question)
        first = self._chat.planted("second", user, facts[0])
        letters = Letters(self._chat.model, first.prompt)
        said = facts[0].reply + facts[0].value
        read = np.concatenate([first.prompt, first.reply, first.answer])
        turn = self._chat.further(user, f"{said}.", facts[1].question)
        known = self._chat.tokens(turn)
        if not np.array_equal(known[: len(read)], read):
            raise InputError(
                f"{self._chat.model.path}: its chat template changes earlier turns; leave out the kind second"
            )
        reply, answer = self._chat.split(known, f"{turn}{self._chat.space(user)}{facts[1].reply}", facts[1].value)
        value = letters.part(facts[1].text, len(facts[1].before), len(facts[1].value))
        further = np.concatenate([known[len(read) :], reply])
        return Task(first.prompt, (np.concatenate([first.reply, first.answer]), further), answer, value)

    def text(self, dice: random.Random, target: int) -> Task:
        """Prose and what follows it, of which only the likelihood counts."""
        model, room = self._chat.model, len(self._text) - target - FOLLOWING
        if room < 0:
            raise InputError(f"the prose has {len(self._text)} tokens, expected at least {target + FOLLOWING}")
        at = dice.randint(0, room)
        prompt = self._text[at : at + target].copy()
        if model.add_bos:
            prompt[0] = model.bos
        return Task(prompt, (), self._text[at + target : at + target + FOLLOWING], ())


KINDS = {
    "count": Tasks.count,
    "list": Tasks.list,
    "variables": Tasks.variables,
    "question-first": Tasks.question_first,
    "paraphrase": Tasks.paraphrase,
    "second": Tasks.second,
    "text": Tasks.text,
}
ALL_KINDS = (*planted.KINDS, *KINDS)
