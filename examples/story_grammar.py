"""Generates endless English stories from a small simulated world, for a tiny language model to learn and answer about.

A story has a hero, a friend, strangers and many small scenes. Scenes tell *facts*: a sentence with a key that no other
sentence of the story has, and a value chosen at random ("Mia hid the red key under the bed."). The question about it
shares the key's words ("Where did Mia hide the red key?"), and the answer repeats the sentence. Between the facts there
are scenes without facts. The same seed gives the same stories.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

GIRLS = [
    "Mia",
    "Anna",
    "Lily",
    "Rose",
    "Clara",
    "Nora",
    "Emma",
    "Ruby",
    "Ella",
    "Greta",
    "Ivy",
    "Luna",
    "Maya",
    "Pearl",
]
BOYS = ["Tom", "Ben", "Max", "Leo", "Finn", "Oscar", "Jack", "Sam", "Hugo", "Theo", "Noah", "Otto", "Felix", "Paul"]
GIRL_KINDS = ["girl", "baker", "queen", "farmer", "teacher", "fox", "rabbit", "painter", "sailor", "owl"]
BOY_KINDS = ["boy", "baker", "king", "farmer", "fisherman", "bear", "hedgehog", "miller", "sailor", "wolf"]
TRAITS = [
    "brave",
    "kind",
    "clever",
    "shy",
    "curious",
    "patient",
    "cheerful",
    "careful",
    "gentle",
    "proud",
    "lazy",
    "quiet",
]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "golden", "silver", "purple", "brown"]
MATERIALS = ["wooden", "iron", "glass", "stone", "paper", "leather", "copper", "woollen"]
THINGS = [
    "key", "ring", "lamp", "book", "coin", "flute", "map", "bell", "cup", "mirror", "feather", "button", "shell",
    "knife", "hat", "coat", "drum", "rope", "candle", "letter", "pearl", "spoon", "clock", "crown",
]  # fmt: skip
CONTAINERS = ["box", "basket", "drawer", "bag", "jar", "chest", "bucket", "pot"]
HIDING = ["under the bed", "behind the door", "beside the well", "under the bridge", "on the shelf", "behind the stove",
          "under the stairs", "in the hollow tree", "on the roof", "beside the gate"]  # fmt: skip
PLACES = ["forest", "village", "harbour", "mountain", "castle", "mill", "market", "garden", "lake", "cave", "island",
          "meadow", "tower", "library", "farm", "valley"]  # fmt: skip
SIDES = ["near", "beside", "behind", "above"]
FOODS = ["apples", "pears", "plums", "carrots", "nuts", "cakes", "loaves", "eggs", "fish", "mushrooms", "berries"]
DISHES = [
    "pea soup",
    "apple pie",
    "warm bread",
    "honey cake",
    "fried fish",
    "plum jam",
    "cheese",
    "porridge",
    "pancakes",
]
PETS = ["dog", "cat", "goat", "pony", "crow", "mouse", "duck", "donkey"]
PET_NAMES = ["Biscuit", "Shadow", "Button", "Pepper", "Star", "Moss", "Clover", "Thunder", "Poppy", "Whisper"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WEATHER = ["sunny", "rainy", "windy", "cold", "foggy", "warm", "snowy", "stormy"]
TIMES = ["morning", "afternoon", "evening", "night"]
FEELINGS = ["sad", "tired", "angry", "afraid", "hungry", "lonely", "surprised", "happy"]
REASONS = ["walked all day", "slept badly", "missed a friend", "broken a cup", "lost a race", "seen a shadow",
           "heard a noise", "found no bread", "waited for hours", "had a strange dream"]  # fmt: skip
SECRETS = ["moonlight", "pepper", "thunder", "apple tree", "silver river", "old friend", "morning star", "seven bells"]


@dataclass
class Person:
    """Someone in a story; ``he``, ``him``, ``his`` are the right pronouns."""

    name: str
    kind: str
    trait: str
    he: str
    him: str
    his: str


@dataclass
class Fact:
    """A fact to remember: a question, its answer as a sentence, and the part of the answer that cannot be guessed."""

    question: str
    answer: str
    value: str


class Exhausted(Exception):
    """The story has used all keys of a kind, so another fact would be confused with an earlier one."""


@dataclass
class World:
    """The state of one story: who is there, where, and what was said so far."""

    rng: random.Random
    hero: Person
    friend: Person
    place: str
    lines: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def key(self, options: list[str]) -> str:
        """One of the options that this story has not used as a key yet."""
        fresh = [option for option in options if option not in self.used]
        if not fresh:
            raise Exhausted
        choice = self.rng.choice(fresh)
        self.used.add(choice)
        return choice

    def any(self, options: list[str]) -> str:
        """One of the options, used before or not."""
        return self.rng.choice(options)

    def once(self, what: str, people: list[Person]) -> Person:
        """One of the people about whom this was not told yet."""
        name = self.key([f"{what} {person.name}" for person in people]).removeprefix(f"{what} ")
        return next(person for person in people if person.name == name)

    def pair(self) -> tuple[Person, Person]:
        """Hero and friend, or friend and hero."""
        return (self.hero, self.friend) if self.rng.random() < 0.5 else (self.friend, self.hero)

    def say(self, *choices: str) -> None:
        """Adds one of the sentences, with a capital letter at its start."""
        self.lines.append(sentence(self.rng.choice(choices)))

    def tell(self, question: str, answer: str, value: str, *leads: str) -> None:
        """Tells a fact, perhaps after an opening word, and remembers it."""
        self.say(self.rng.choice(["", *leads]) + answer)
        self.facts.append(Fact(question, sentence(answer), value))


def sentence(text: str) -> str:
    """The text with capital letters at the start of sentences."""
    return re.sub(r'(^"?|[.!?] "?)([a-z])', lambda found: found[1] + found[2].upper(), text)


def article(noun: str) -> str:
    """``a`` or ``an`` and the noun."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def person(rng: random.Random, used: set[str]) -> Person:
    """A person with an unused name."""
    girl = rng.random() < 0.5
    names = [n for n in (GIRLS if girl else BOYS) if n not in used]
    if not names:
        raise Exhausted
    name = rng.choice(names)
    used.add(name)
    words = ("she", "her", "her") if girl else ("he", "him", "his")
    return Person(name, rng.choice(GIRL_KINDS if girl else BOY_KINDS), rng.choice(TRAITS), *words)


# scenes that tell facts


def home(w: World) -> None:
    """Where somebody lives, or the colour of the door."""
    who = w.once("home", [w.hero, w.friend])
    where = f"{w.any(SIDES)} the {w.any(PLACES)}"
    w.tell(f"Where did {who.name} live?", f"{who.name} lived {where}.", where, "at that time ", "for many years ")
    if w.rng.random() < 0.5:
        colour = w.any(COLOURS)
        w.tell(
            f"What colour was {who.name}'s door?", f"{who.name}'s door was {colour}.", colour, "everybody knew that "
        )


def age(w: World) -> None:
    """How old somebody is."""
    who = w.once("age", [w.hero, w.friend])
    number = w.any(NUMBERS)
    w.tell(f"What was {who.name}'s age?", f"{who.name}'s age was {number}.", number, "that year ", "in spring ")


def keep_pet(w: World) -> None:
    """A pet, its name, its tail."""
    owner, _ = w.pair()
    pet, name, colour = w.key(PETS), w.any(PET_NAMES), w.any(COLOURS)
    w.tell(f"What was {owner.name}'s {pet} called?", f"{owner.name}'s {pet} was called {name}.", name, "of course ")
    w.say(
        f"the {pet} followed {owner.him} everywhere.",
        f"the {pet} slept beside {owner.his} bed.",
        f"the {pet} was always hungry.",
    )
    if w.rng.random() < 0.5:
        w.tell(
            f"What colour of tail did the {pet} have?", f"the {pet} had a {colour} tail.", colour, "strange to say, "
        )


def hide_thing(w: World) -> None:
    """A thing is hidden, and nobody must forget where."""
    who, _ = w.pair()
    thing, where = f"{w.any(COLOURS)} {w.key(THINGS)}", w.any(HIDING)
    w.tell(
        f"Where did {who.name} hide the {thing}?", f"{who.name} hid the {thing} {where}.", where,
        f"one {w.any(TIMES)} ", f"that {w.any(TIMES)} ", "in secret ",
    )  # fmt: skip
    if w.rng.random() < 0.6:
        w.say(
            f'"I must not forget it," {who.he} said.', "nobody else saw it.", f'"There it is safe," {who.he} thought.'
        )


def put_thing(w: World) -> None:
    """A thing is put into something."""
    who, other = w.pair()
    thing, box = f"{w.any(MATERIALS)} {w.key(THINGS)}", f"{w.any(MATERIALS)} {w.any(CONTAINERS)}"
    w.tell(
        f"Where did {who.name} put the {thing}?", f"{who.name} put the {thing} in the {box}.", box,
        f"one {w.any(TIMES)} ", "then ", "before dinner ",
    )  # fmt: skip
    if w.rng.random() < 0.4:
        w.say(f"{other.name} watched {who.him}.", f'"Well done," said {other.name}.', "it was heavy.")


def find_thing(w: World) -> None:
    """Something is lost and found again, by looking in the wrong place first."""
    who, other = w.pair()
    thing, right = f"{w.any(MATERIALS)} {w.key(THINGS)}", w.any(HIDING)
    w.say(f'"my {thing} is gone!" cried {other.name}.', f"{other.name} could not see {other.his} {thing} any more.")
    if w.rng.random() < 0.5:
        wrong = w.any([place for place in HIDING if place != right])
        w.say(f"they looked {wrong}, but there was only dust.", f"it was not {wrong}.")
    w.tell(
        f"Where did {who.name} find the {thing}?", f"{who.name} found the {thing} {right}.", right, "at last ", "soon "
    )


def sell_thing(w: World) -> None:
    """Something is sold."""
    who, other = w.pair()
    thing, price = f"{w.any(COLOURS)} {w.key(THINGS)}", w.any(NUMBERS)
    w.tell(
        f"For how many pennies did {who.name} sell the {thing}?", f"{who.name} sold the {thing} for {price} pennies.",
        price, f"at the {w.place} ", "the next day ",
    )  # fmt: skip
    if w.rng.random() < 0.4:
        w.say(f'"That is not much," said {other.name}.', f"{other.name} counted them twice.")


def count_food(w: World) -> None:
    """Somebody counts things to eat."""
    who, other = w.pair()
    food, number = w.key(FOODS), w.any(NUMBERS)
    w.tell(
        f"How many did {who.name} find when {who.he} counted the {food}?",
        f"{who.name} counted the {food} and found {number}.", number, "in the kitchen ", "after lunch ",
    )  # fmt: skip
    if w.rng.random() < 0.5:
        w.say(f'"Let us share them," said {other.name}.', f"{other.name} ate one of them.", "they were very good.")


def travel(w: World) -> None:
    """On to the next place, in some weather."""
    h, f = w.hero, w.friend
    place, weather = w.key([f"way {place}" for place in PLACES]).removeprefix("way "), w.any(WEATHER)
    w.say(
        f"then the two friends went to the {place}.",
        f"{h.name} and {f.name} walked from the {w.place} to the {place}.",
        f'"Let us go to the {place}," said {f.name}.',
    )
    w.tell(f"How was the day at the {place}?", f"the day at the {place} was {weather}.", weather, "as I heard, ")
    w.place = place


def feel(w: World) -> None:
    """A feeling and its reason, and what the other does about it."""
    who, other = w.pair()
    feeling = w.key([f"{who.name} {feeling}" for feeling in FEELINGS]).split()[1]
    why = w.any(REASONS)
    why = f"{who.he} had {why}"
    w.tell(f"Why was {who.name} {feeling}?", f"{who.name} was {feeling} because {why}.", why, "now ", "again ")
    if w.rng.random() < 0.6:
        w.say(
            f"{other.name} told {who.him} a story.",
            f'"I will help you," said {other.name}.',
            f"{other.name} gave {who.him} a cup of warm milk.",
        )


def meet_stranger(w: World) -> None:
    """A stranger gives somebody something."""
    who, _ = w.pair()
    s = person(w.rng, w.used)
    gift = f"{w.any(COLOURS)} {w.any(THINGS)}"
    w.say(
        f"on the way they met {article(s.trait)} {s.kind} named {s.name}.",
        f"{article(s.kind)} was sitting under a tree. {s.his} name was {s.name}.",
    )
    w.tell(
        f"What did {s.name} give {who.name}?", f"{s.name} gave {who.name} a {gift}.", gift, "with a smile ", "later "
    )


def secret_word(w: World) -> None:
    """A gate, and the word that opens it."""
    place = w.key([f"word {place}" for place in PLACES]).removeprefix("word ")
    word, asker = w.any(SECRETS), w.pair()[0]
    w.tell(
        f"What was the secret word of the {place}?", f"the secret word of the {place} was {word}.", word,
        "listen: ", "only few people knew it: ",
    )  # fmt: skip
    if w.rng.random() < 0.4:
        w.say(f"{asker.name} said it three times.", f"{asker.name} nodded.", f'"Tell nobody," whispered {asker.name}.')


def meal(w: World) -> None:
    """What somebody likes to eat."""
    who = w.once("meal", [w.hero, w.friend])
    dish = w.any(DISHES)
    w.tell(f"What did {who.name} like to eat?", f"{who.name} liked to eat {dish}.", dish, "more than anything ")
    w.say("it was soon ready.", f"{who.he} ate and ate.", "the whole house smelled of it.")


def worker(w: World) -> None:
    """Who works where."""
    place = w.key([f"work {place}" for place in PLACES]).removeprefix("work ")
    s = person(w.rng, w.used)
    who = f"{s.kind} named {s.name}"
    w.tell(f"Who worked at the {place}?", f"at the {place} worked {article(who)}.", who, "that year ")


FACTS = [
    home, age, keep_pet, hide_thing, put_thing, find_thing, sell_thing, count_food, travel, feel, meet_stranger,
    secret_word, meal, worker, hide_thing, put_thing, find_thing,
]  # fmt: skip


# scenes without facts


def landscape(w: World) -> None:
    """Sights and sounds."""
    w.say(
        f"the {w.any(['grass', 'water', 'snow', 'moss', 'sand'])} was soft under their feet.",
        f"the wind blew over the {w.any(['hills', 'fields', 'roofs', 'trees'])}.",
        f"far away {article(w.any(['dove', 'wolf', 'cock', 'horn', 'river']))} could be heard.",
        f"clouds {w.any(['rose', 'came', 'hung', 'passed'])} in the {w.any(['east', 'west', 'north', 'south'])}.",
        f"it smelled of {w.any(['smoke', 'rain', 'roses', 'hay', 'salt'])}.",
    )


def chatter(w: World) -> None:
    """Small talk."""
    a, b = w.pair()
    w.say(
        f'"good {w.any(TIMES)}," said {a.name}. "How are you?" {b.name} {w.any(["laughed", "smiled", "nodded"])}.',
        f'"Are you {w.any(["cold", "thirsty", "ready", "awake"])}?" asked {a.name}. "Not yet," said {b.name}.',
        f'{a.name} said, "You are {w.any(TRAITS)}." "So are you," said {b.name}.',
        f'"Look!" cried {a.name}. "{article(w.any(["ship", "rainbow", "squirrel", "star", "kite"]))}!"',
    )


def game(w: World) -> None:
    """They play or work."""
    a, b = w.pair()
    w.say(
        f"they {w.any(['sang', 'danced', 'played', 'rested', 'laughed'])} until the {w.any(['sun', 'moon'])} came out.",
        f"{a.name} ran, and {b.name} came behind.",
        f"{a.name} {w.any(['swept the floor', 'made a fire', 'washed the windows', 'fed the hens', 'cut some wood'])}.",
        f"{b.name} taught {a.name} a {w.any(['long', 'short', 'merry', 'sad'])} song.",
    )


def trouble(w: World) -> None:
    """Something happens, and courage helps."""
    brave, saved = w.pair()
    w.say(
        "suddenly the sky turned black.",
        "a big wave came.",
        "then they heard a loud noise in the dark.",
        "the ladder broke with a crack.",
    )
    w.say(
        f"{saved.name} fell into the water, but {brave.name} held {saved.his} hand.",
        f"{saved.name} wanted to run away, but {brave.name} was not afraid.",
        f"{brave.name} lit a fire and led {saved.name} home.",
    )


FILLERS = [landscape, chatter, game, landscape, chatter, game, trouble]


def remember(w: World) -> None:
    """The people talk about an earlier fact."""
    fact, (asker, teller) = w.rng.choice(w.facts), w.pair()
    w.say(
        f'"{fact.question}" asked {asker.name}. {teller.name} remembered: "{fact.answer}"',
        f'{asker.name} thought for a while. "{fact.question}" "{fact.answer}"',
    )


def opening(w: World) -> None:
    """Who the hero and the friend are."""
    h, f = w.hero, w.friend
    start = w.any(["Once upon a time there was", "Long ago there lived", "There was once", "In a far land lived"])
    w.say(
        f"{start} {article(h.trait)} {h.kind} named {h.name}.",
        f"{start} {article(h.kind)} named {h.name}, who was very {h.trait}.",
    )
    w.say(
        f"{h.his} best friend was {f.name}, {article(f.trait)} {f.kind}.",
        f"{h.he} had a friend, {article(f.kind)} named {f.name}.",
    )


def ending(w: World) -> None:
    """Home again."""
    h, f = w.hero, w.friend
    w.say(
        f"when the moon rose, {h.name} and {f.name} went home.",
        "at last they came home, tired and happy.",
        f"in the end {h.name} was happy.",
    )
    w.say(
        f"{h.name} had learned that a friend like {f.name} is worth more than gold.",
        "and they lived happily for many years.",
        f'"What a day!" said {f.name}, and they both laughed.',
        f"{h.name} fell asleep and dreamed of the {w.place}.",
    )


# documents


def tell(rng: random.Random, facts: int, fillers: float = 0.5, memories: float = 0.2) -> World:
    """One story with at least `facts` facts, unless its keys run out; the returned world holds its lines and facts.

    fillers, memories: how often a scene without a fact, or a repeated fact, follows a scene with facts.
    """
    used: set[str] = set()
    world = World(rng, person(rng, used), person(rng, used), rng.choice(PLACES), used=used)
    opening(world)
    deck: list[Callable[[World], None]] = []
    failed = 0
    while len(world.facts) < facts and failed < 20:
        deck = deck or rng.sample(FACTS, len(FACTS))
        try:
            deck.pop()(world)
        except Exhausted:
            failed += 1
            continue
        while rng.random() < fillers:
            rng.choice(FILLERS)(world)
        if rng.random() < memories:
            remember(world)
    ending(world)
    return world


@dataclass
class Talk:
    """A document: a story alone, or a request, the story, and facts to ask about."""

    request: str
    story: str
    facts: list[Fact]


def talk(rng: random.Random, max_facts: int = 12) -> Talk:
    """One document of up to `max_facts` facts, with questions about all of them or none."""
    world = tell(rng, rng.randint(1, max_facts), 0.8 * rng.random() * rng.random(), rng.choice([0, 0.2]))
    story = " ".join(world.lines)
    if rng.random() < 0.15:
        return Talk("", story, [])
    h, f = world.hero, world.friend
    requests = [
        f"Tell me a story about {h.name} and {f.name}.",
        f"Tell me a story about {article(h.kind)} named {h.name}.",
        "Tell me a story.",
        f"Tell me about {h.name} the {h.kind}.",
    ]
    return Talk(rng.choice(requests), story, rng.sample(world.facts, len(world.facts)))


def as_text(document: Talk) -> str:
    """A document as plain text: the story, or lines that start with ``User:`` and ``Bot:``."""
    if not document.request:
        return document.story
    lines = [f"User: {document.request}", f"Bot: {document.story}"]
    for fact in document.facts:
        lines += [f"User: {fact.question}", f"Bot: {fact.answer}"]
    return "\n".join(lines)


def texts(seed: int, max_facts: int = 12) -> Iterator[Talk]:
    """Endless documents."""
    rng = random.Random(seed)
    while True:
        yield talk(rng, max_facts)
