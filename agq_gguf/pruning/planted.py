"""Prompts with known answers: facts planted in a user's text, and a question about one of them.

A prompt is written in the model's own chat template, or as plain text with "Question:" and "Answer:" if it has none.
The answer is right if each of its tokens is the likeliest one after the given first words of the reply.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from agq_gguf.errors import InputError
from agq_gguf.pruning.facts import FACT_WORDS, WORDS, Fact, facts_of_one_kind, functions, two_facts
from agq_gguf.runtime.chat_format import prompt_tokens
from agq_gguf.runtime.dialogues import prompt_renderer
from agq_gguf.runtime.model import Model

KINDS = ("needle", "facts", "functions")

_FACTS = 6  # of one kind, in a prompt of the kind "facts"
_SENTENCE = (30, 220)  # characters
# Digits and quotes look like values; the others could be markup, or special tokens of a chat template.
_UNFIT = re.compile(r"[\d\"'`\u2018-\u201f<>\[\]{}|@=#*_\\]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*")
_SPACE = re.compile(rb"[ \t\r\n]|\xe2\x96\x81")  # the last one is SentencePiece's mark for a space


@dataclass(frozen=True)
class Planted:
    """A prompt and its right answer; token ids."""

    kind: str
    prompt: NDArray[np.int32]  # [T], with the beginning token if the model adds one, up to the reply
    reply: NDArray[np.int32]  # the given first words of the reply
    answer: NDArray[np.int32]  # what follows them
    value: tuple[int, ...]  # indices of the prompt's tokens that spell the asked value, or a part of it
    tail: int  # tokens of the prompt after the user's last word: end of the turn, header of the assistant's turn


def sentences_of(text: str) -> list[str]:
    """The sentences of a text that may surround facts: no digits, quotes, markup or words that facts are made of."""
    found = _SENTENCE_END.split(re.sub(r"\s+", " ", text))
    return [
        sentence
        for sentence in map(str.strip, found)
        if _SENTENCE[0] <= len(sentence) <= _SENTENCE[1]
        and sentence[0].isalpha()
        and not sentence[0].islower()
        and not _UNFIT.search(sentence)
        and FACT_WORDS.isdisjoint(re.findall(r"\w+", sentence.lower()))
    ]


def plant(model: Model, sentences: Sequence[str], kind: str, seed: int, tokens: tuple[int, int]) -> Planted:
    """A prompt of `tokens` (minimum, maximum) tokens; the same one for the same arguments.

    "needle" has two facts of different kinds between sentences, "facts" six facts of one kind, and "functions" a file
    of Python functions; the question is about one of them. `sentences` are what `sentences_of` returned. Raises
    InputError if there are too few sentences, or for lengths that no prompt can have.
    """
    if kind not in KINDS:
        raise InputError(f"kind of prompt must be one of {', '.join(KINDS)}, got {kind!r}")
    dice = random.Random(f"{kind} {seed}")
    target = dice.randint(*_checked(tokens))
    chat = Chat(model)
    if kind == "functions":
        return _functions(chat, sentences, dice, tokens, target)
    facts = two_facts(dice) if kind == "needle" else facts_of_one_kind(dice, _FACTS)
    user = in_prose(chat, [fact.text for fact in facts], facts[0].question, sentences, dice, tokens, target)
    return chat.planted(kind, user, facts[0])


def in_prose(
    chat: Chat,
    facts: Sequence[str],
    question: str,
    sentences: Sequence[str],
    dice: random.Random,
    tokens: tuple[int, int],
    target: int,
    *,
    ask: Callable[[str, str], str] | None = None,
    in_order: bool = False,
) -> str:
    """What the user says: facts at random places between successive sentences from a random place, and a question.

    `ask` puts a text and a question together; None: the question comes last. With `in_order` the facts keep their
    order.
    """
    ask = ask or chat.asked
    start = dice.randrange(max(len(sentences), 1))
    places = [dice.random() for _ in facts]
    if in_order:
        places.sort()

    def build(found: Sequence[str]) -> str:
        after: list[list[str]] = [[] for _ in range(len(found) + 1)]
        for place, fact in zip(places, facts, strict=True):
            after[int(place * len(after))].append(fact)
        parts = [
            *after[0],
            *(part for sentence, more in zip(found, after[1:], strict=True) for part in (sentence, *more)),
        ]
        return ask(" ".join(parts), question)

    return fitted(chat, build, [*sentences[start:], *sentences[:start]], (), tokens, target)


def _functions(
    chat: Chat, sentences: Sequence[str], dice: random.Random, tokens: tuple[int, int], target: int
) -> Planted:
    asked, *others = functions(dice, len(WORDS))
    place, start = dice.random(), dice.randrange(max(len(sentences), 1))

    def build(found: Sequence[str]) -> str:
        # Sentences are used only where no whole function has room; they are comments at the top.
        comments = [f"# {text}\n" for text in found if not text.startswith("def ")]
        listed = [text for text in found if text.startswith("def ")]
        listed.insert(int(place * (len(listed) + 1)), asked.text)
        code = "\n\n".join(["".join(comments), *listed] if comments else listed)
        return chat.asked(f"```python\n{code}```", asked.question)

    further = [*sentences[start:], *sentences[:start]]
    return chat.planted(
        "functions", fitted(chat, build, [other.text for other in others], further, tokens, target), asked
    )


def fitted(
    chat: Chat,
    build: Callable[[Sequence[str]], str],
    units: Sequence[str],
    further: Sequence[str],
    tokens: tuple[int, int],
    target: int,
) -> str:
    """The user's text built of so many of the `units` that the whole prompt has about `target` tokens.

    Where the minimum is missed it gets sentences of `further` (if empty, the next units), the last one perhaps cut.
    Raises InputError if they do not suffice.
    """
    low, high = _checked(tokens)

    @cache
    def length(found: tuple[str, ...]) -> int:
        return len(chat.tokens(chat.prompt(build(found))))

    bare = length(())
    if bare > high:
        raise InputError(
            f"{chat.model.path}: a prompt with its facts alone has {bare} tokens, expected at most {high}; "
            "ask for longer prompts"
        )
    room, n = target - bare, 0
    while n < len(units) and (room := room - len(chat.model.tokenize(units[n], add_special=False))) >= 0:
        n += 1
    found = tuple(units[:n])
    while found and length(found) > high:
        found = found[:-1]
    spare = list(further or units[len(found) :])
    while length(found) < low and spare:
        words = spare.pop(0).split(" ")
        for end in range(len(words), 0, -1):
            if length(longer := (*found, " ".join(words[:end]))) <= high:
                found = longer
                break
        else:
            raise InputError(
                f"{chat.model.path}: no prompt of {low} to {high} tokens can be made; allow more different lengths"
            )
    if length(found) < low:
        raise InputError(
            f"the text has too few sentences for a prompt of {low} tokens: those between which facts can be planted "
            f"give {length(found)} tokens; use a longer text"
        )
    return build(found)


def _checked(tokens: tuple[int, int]) -> tuple[int, int]:
    if not 0 < tokens[0] <= tokens[1]:
        raise InputError(f"prompts must have from 1 token on, the minimum first, got {tokens[0]} to {tokens[1]}")
    return tokens


class Chat:
    """How a model is asked: in its own chat template, or in plain text."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._render = prompt_renderer(model)

    def asked(self, body: str, question: str) -> str:
        """What the user says: a text and a question about it."""
        return f"{body}\n\n{question}" if self._render else f"{body}\n\nQuestion: {question}"

    def prompt(self, user: str) -> str:
        """The whole prompt, up to the assistant's first word."""
        return self._render((("user", user),)) if self._render else f"{user}\nAnswer:"

    def said(self, user: str, reply: str) -> str:
        """The prompt and what the assistant says, without the end of its turn."""
        return self.prompt(user) + self.space(user) + reply

    def further(self, user: str, reply: str, question: str) -> str:
        """The prompt of a further question, which begins as `said` does if the template leaves earlier turns alone."""
        if self._render:
            return self._render((("user", user), ("assistant", reply), ("user", question)))
        return f"{self.said(user, reply)}\n\nQuestion: {question}\nAnswer:"

    def space(self, user: str) -> str:
        """The white space between the header of the assistant's turn and its first word."""
        if not self._render:
            return " "
        prompt = self.prompt(user)
        try:
            answered = self._render((("user", user), ("assistant", "Yes")))
        except Exception:  # a template is a program from the file; it may raise anything
            return ""
        more = answered[len(prompt) :] if answered.startswith(prompt) else ""
        return more[: len(more) - len(more.lstrip(" \n"))]

    def tokens(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text that `prompt`, `said` or `further` returned."""
        return prompt_tokens(self.model, text)

    def planted(self, kind: str, user: str, fact: Fact) -> Planted:
        """The prompt with this user's turn, which holds the fact, and the answer to the fact's question."""
        prompt = self.tokens(self.prompt(user))
        reply, answer = self.split(prompt, self.said(user, fact.reply), fact.value)
        letters = Letters(self.model, prompt)
        value = letters.part(fact.text, len(fact.before), len(fact.value))
        tail = len(prompt) - 1 - letters.part(user[-80:], 0, len(user[-80:]), last=True)[-1]
        return Planted(kind, prompt, reply, answer, value, tail)

    def split(self, read: NDArray[np.int32], said: str, value: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The tokens that follow what was `read`: those of the reply, and those that spell the value after it.

        `said` is the text up to the value.
        """
        both = self.tokens(said + value)
        if len(both) <= len(read) or (both[: len(read)] != read).any():
            raise InputError(
                f"{self.model.path}: its tokenizer joins the end of a prompt with the reply, so no answer can be given"
            )
        letters = Letters(self.model, both)
        first = letters.part(value, 0, len(value), last=True)[0]
        return both[len(read) : max(first, len(read))], both[max(first, len(read)) :]


class Letters:
    """Which letters the tokens of a text spell. White space and case do not count: tokenizers add and change them."""

    def __init__(self, model: Model, tokens: NDArray[np.int32]) -> None:
        pieces = [_letters(model.bytes_of(int(token))) for token in tokens]
        self._path = model.path
        self._text = b"".join(pieces)
        self._token = [i for i, piece in enumerate(pieces) for _ in piece]  # of each letter

    def part(self, text: str, start: int, count: int, *, last: bool = False) -> tuple[int, ...]:
        """The tokens that spell `count` characters from `start` on of a text which the tokens hold once.

        With `last`, of its last occurrence. Raises InputError if they do not spell the text.
        """
        whole = _letters(text.encode())
        at = self._text.rfind(whole) if last else self._text.find(whole)
        if at < 0 or not (last or self._text.find(whole, at + 1) < 0):
            raise InputError(
                f"{self._path}: its tokens do not spell the text of a prompt, so no fact can be found in it"
            )
        begin = at + len(_letters(text[:start].encode()))
        return tuple(sorted(set(self._token[begin : begin + len(_letters(text[start : start + count].encode()))])))


def _letters(raw: bytes) -> bytes:
    return _SPACE.sub(b"", raw).lower()
