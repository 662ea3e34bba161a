"""Facts to plant in a text, each with a question and the first words of its answer; and functions that return words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Adam Agnes Albert Amanda Andrew Barbara Benjamin Bernard Caroline Catherine Claire Daniel Deborah Dennis Dorothy "
    "Edward Eleanor Emily Eric Frances Gabriel George Gerald Hannah Harold Isabel Jacob Janet Jessica Joseph Kevin "
    "Laura Leonard Linda Louise Lucas Margaret Martha Matthew Monica Nathan Oliver Olivia Patricia Philip Rachel "
    "Rebecca Richard Samuel Sandra Sophie Stephen Susan Theodore Timothy Vincent"
)
CITIES = _words(
    "Amsterdam Athens Barcelona Beijing Berlin Boston Brussels Budapest Cairo Chicago Copenhagen Dallas Delhi Denver "
    "Dublin Geneva Hamburg Helsinki Istanbul Jakarta Lisbon London Madrid Miami Milan Montreal Moscow Munich Oslo "
    "Paris Prague Rome Seattle Seoul Singapore Stockholm Toronto Tokyo Vienna Warsaw"
)
_PLACES = _words(
    "attic bakery balcony barn basement bathroom bedroom cabin castle cellar church corridor factory garage garden "
    "greenhouse hospital hotel kitchen laundry library museum office pharmacy prison restaurant school shed stable "
    "station theatre warehouse workshop"
)
_JOBS = _words(
    "baker banker barber butcher carpenter chemist clerk cook dentist detective doctor driver farmer fisherman florist "
    "gardener hunter journalist judge lawyer librarian mechanic musician nurse painter photographer pilot plumber "
    "poet postman sailor shoemaker surgeon tailor teacher waiter weaver"
)
_PETS = _words(
    "bear beaver camel canary cat chicken cow crab crocodile deer dog dolphin donkey duck ferret fox frog goat goose "
    "hamster hedgehog horse kangaroo lizard monkey mouse parrot penguin pig pigeon rabbit sheep snake spider squirrel "
    "swan tiger turkey turtle wolf zebra"
)
WORDS = _words(
    "amber anchor basket blanket bottle bridge bronze bucket butter button candle carpet cherry circle coffee copper "
    "cotton crystal diamond dragon eagle falcon feather finger forest fountain ginger guitar hammer harbor helmet "
    "honey island jacket kettle ladder lantern leather lemon marble meadow mirror mountain needle orange oyster paper "
    "pearl pencil pepper pillow planet pocket powder pumpkin purple ribbon river rocket saddle salmon shadow silver "
    "spring statue summer sugar thunder timber tunnel umbrella valley velvet violet walnut whistle window winter"
)
_VERBS = _words(
    "apply build change check clean close collect compare copy count create delete fetch filter find format join load "
    "merge move open parse print read render reset save scan select send sort split start store train update write"
)
_NOUNS = _words(
    "account batch buffer column event folder graph header image index label matrix message node order packet page "
    "policy profile query record report request row schema session socket table task ticket token vector widget"
)
_ARGUMENTS = _words("items rows data nodes parts lines keys blocks entries values")
_BODIES = (  # a, b: names; n: a number
    "    total = 0\n    for item in {a}:\n        total += item.{b}\n    log(total)\n",
    "    if not {a}:\n        raise ValueError('no {b}')\n    {b} = sorted({a})\n    log({b})\n",
    "    with open({a}) as stream:\n        {b} = stream.read()\n    log(len({b}))\n",
    "    {b} = [x for x in {a} if x.size > {n}]\n    while {b}:\n        log({b}.pop())\n",
    "    try:\n        {b} = {a}['{b}']\n    except KeyError:\n        {b} = None\n    log({b})\n",
    "    {b} = min(len({a}), {n})\n    log({a}[:{b}])\n",
    "    for i, part in enumerate({a}):\n        if i % {n} == 0:\n            log(part.{b})\n",
    "    {b} = set({a})\n    log(len({a}) - len({b}))\n",
)


@dataclass(frozen=True)
class Fact:
    """A sentence (or a function) around a value, and how one asks for it."""

    before: str
    value: str
    after: str
    question: str
    reply: str  # the first words of the answer; the value follows

    @property
    def text(self) -> str:
        """The whole sentence."""
        return self.before + self.value + self.after


@dataclass(frozen=True)
class Wording:
    """The text of one kind of fact. ``{0}`` is a name; the value is between `before` and `after`, and after `reply`."""

    before: str
    after: str
    question: str
    reply: str
    values: Sequence[str]

    def fact(self, name: str, value: str) -> Fact:
        """The fact about this name."""
        before, question, reply = (text.format(name) for text in (self.before, self.question, self.reply))
        return Fact(before, value, self.after, question, reply)


WORDINGS = (
    Wording(
        "The secret code of {0} is ", ".", "What is the secret code of {0}?", "The secret code of {0} is ",
        tuple(map(str, range(1000, 10000))),
    ),
    Wording("{0} lives in the city of ", ".", "In which city does {0} live?", "{0} lives in the city of ", CITIES),
    Wording(
        "{0} put the old bicycle into the ", ".", "Where is the old bicycle of {0}?",
        "The old bicycle of {0} is in the ", _PLACES,
    ),
    Wording(
        "{0} has earned a living as a ", " for many years.", "What is the profession of {0}?", "{0} works as a ", _JOBS
    ),
    Wording(
        "{0} owns an animal, a ", ", and feeds it every morning.", "Which animal does {0} own?", "{0} owns a ", _PETS
    ),
)  # fmt: skip

# A sentence with one of these could answer a question, or be taken for a fact.
FACT_WORDS = frozenset(
    word.lower()
    for words in (NAMES, CITIES, _PLACES, _JOBS, _PETS, ["lives", "live", "secret", "code", "codes", "bicycle"])
    for word in words
) | {"bicycles", "living", "profession", "owns", "own", "animal", "feeds"}


def two_facts(dice: random.Random) -> list[Fact]:
    """Facts of two kinds about two people; the first is the one to be asked for."""
    wordings, names = dice.sample(WORDINGS, 2), dice.sample(NAMES, 2)
    return [wording.fact(name, dice.choice(wording.values)) for wording, name in zip(wordings, names, strict=True)]


def facts_of_one_kind(dice: random.Random, count: int) -> list[Fact]:
    """Facts of one kind about `count` people, with different values; the first is the one to be asked for."""
    wording = dice.choice(WORDINGS)
    names, values = dice.sample(NAMES, count), dice.sample(wording.values, count)
    return [wording.fact(name, value) for name, value in zip(names, values, strict=True)]


def functions(dice: random.Random, count: int) -> list[Fact]:
    """Python functions with different names that return different words; at most `len(WORDS)` of them."""
    names = dice.sample([f"{verb}_{noun}" for verb in _VERBS for noun in _NOUNS], count)
    return [_function(name, value, dice) for name, value in zip(names, dice.sample(WORDS, count), strict=True)]


def _function(name: str, value: str, dice: random.Random) -> Fact:
    a, b = dice.sample(_ARGUMENTS, 2)
    body = dice.choice(_BODIES).format(a=a, b=b, n=dice.randint(2, 90))
    return Fact(
        f'def {name}({a}):\n{body}    return "',
        value,
        '"\n',
        f"What does the function `{name}` return?",
        f'The function `{name}` returns the string "',
    )
