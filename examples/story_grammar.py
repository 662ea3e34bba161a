"""Endless English stories from a small simulated world: what a tiny language model can learn, and be asked about.

A story has a hero, a friend and a helper, each with traits, possessions and places. Scenes change that world and note
*facts*: a question and its answer ("Where was the red key?", "In the wooden box."). Facts come up again many sentences
later, inside the story and in questions after it, so a reader must remember. The same seed gives the same stories.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

GIRLS = [
    "Mia", "Anna", "Lily", "Rose", "Clara", "Nora", "Emma", "Ruby", "Ella", "Tilda", "Greta", "Ivy", "Sofia", "Hanna",
    "Luna", "Zoe", "Maya", "Ada", "Olive", "Pearl",
]  # fmt: skip
BOYS = [
    "Tom", "Ben", "Max", "Leo", "Finn", "Oscar", "Jack", "Sam", "Hugo", "Theo", "Noah", "Otto", "Felix", "Emil",
    "Paul", "Adam", "Karl", "Niko", "Pip", "Ravi",
]  # fmt: skip
GIRL_KINDS = ["girl", "baker", "queen", "farmer", "teacher", "fox", "rabbit", "painter", "sailor", "owl"]
BOY_KINDS = ["boy", "baker", "king", "farmer", "fisherman", "bear", "hedgehog", "miller", "sailor", "wolf"]
TRAITS = [
    "brave", "kind", "clever", "shy", "curious", "patient", "cheerful", "careful", "gentle", "proud", "lazy", "quiet",
]  # fmt: skip
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "golden", "silver", "purple", "brown"]
MATERIALS = ["wooden", "iron", "glass", "stone", "paper", "leather", "copper", "woollen"]
THINGS = [
    "key", "ring", "lamp", "book", "coin", "flute", "map", "bell", "cup", "mirror", "feather", "button", "shell",
    "knife",
]  # fmt: skip
CONTAINERS = ["box", "basket", "drawer", "bag", "jar", "chest", "bucket", "pot"]
HIDING = ["under the bed", "behind the door", "beside the well", "under the bridge", "on the shelf", "behind the stove",
          "under a flat stone", "in the hollow tree", "on the roof", "beside the gate"]  # fmt: skip
PLACES = ["forest", "village", "harbour", "mountain", "castle", "mill", "market", "garden", "lake", "cave", "island",
          "meadow", "tower", "library", "farm", "valley"]  # fmt: skip
FOODS = ["apple", "pear", "plum", "carrot", "nut", "cake", "loaf", "egg", "fish", "mushroom", "berry", "potato"]
PLURALS = {"loaf": "loaves", "fish": "fish", "berry": "berries", "potato": "potatoes"}
DISHES = [
    "pea soup", "apple pie", "warm bread", "honey cake", "fried fish", "plum jam", "cheese", "porridge", "pancakes",
]  # fmt: skip
PETS = ["dog", "cat", "goat", "pony", "crow", "mouse", "duck", "donkey"]
PET_NAMES = ["Biscuit", "Shadow", "Button", "Pepper", "Star", "Moss", "Clover", "Thunder", "Poppy", "Whisper"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WEATHER = ["sunny", "rainy", "windy", "cold", "foggy", "warm", "snowy", "stormy"]
TIMES = ["morning", "afternoon", "evening", "night"]
FEELINGS = ["happy", "sad", "tired", "angry", "afraid", "surprised", "hungry", "lonely"]
SECRETS = ["moonlight", "pepper", "thunder", "apple tree", "silver river", "old friend", "morning star", "seven bells"]
WHY_SAD = {
    "tired": ["had walked all day", "had not slept", "had carried stones since dawn"],
    "sad": ["missed an old friend", "had broken a cup", "could not find the way home"],
    "angry": ["had been told a lie", "had waited for hours", "had lost a race"],
    "afraid": ["had heard a noise in the dark", "had seen a shadow", "did not like the storm"],
    "hungry": ["had not eaten since dawn", "had given all the bread away", "had forgotten to pack lunch"],
    "lonely": ["had nobody to talk to", "had moved to a new place", "had no letter from home"],
}


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
    """Something to remember: a question, the short answer and the answer as a sentence."""

    question: str
    short: str
    full: str


@dataclass
class World:
    """The state of one story: who is there, where, and what was said so far."""

    rng: random.Random
    hero: Person
    friend: Person
    helper: Person
    home: str
    place: str
    lines: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def pick(self, options: list[str]) -> str:
        """One of the options, never the same twice in a story while others are left."""
        fresh = [option for option in options if option not in self.used] or options
        choice = self.rng.choice(fresh)
        self.used.add(choice)
        return choice

    def say(self, *choices: str) -> None:
        """Adds one of the sentences, its first letter made large."""
        text = self.rng.choice(choices)
        self.lines.append(text[0].upper() + text[1:])

    def note(self, question: str, short: str, full: str) -> None:
        """Remembers a fact."""
        self.facts.append(Fact(question, short[0].upper() + short[1:], full[0].upper() + full[1:]))


def article(noun: str) -> str:
    """``a`` or ``an`` and the noun."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """More than one of it."""
    return PLURALS.get(noun, noun + "s")


def person(rng: random.Random, taken: set[str]) -> Person:
    """Somebody whose name is not taken."""
    girl = rng.random() < 0.5
    name = rng.choice([n for n in (GIRLS if girl else BOYS) if n not in taken])
    taken.add(name)
    words = ("she", "her", "her") if girl else ("he", "him", "his")
    return Person(name, rng.choice(GIRL_KINDS if girl else BOY_KINDS), rng.choice(TRAITS), *words)


# scenes: each changes the world, tells it and may note facts


def opening(w: World) -> None:
    """Who the hero is and where the hero lives."""
    h, f = w.hero, w.friend
    start = w.rng.choice(
        ["Once upon a time there was", "Long ago there lived", "There was once", "In a far land lived"]
    )
    w.say(
        f"{start} {article(h.trait)} {h.kind} named {h.name}.",
        f"{start} {article(h.kind)} called {h.name}, who was very {h.trait}.",
    )
    side = w.rng.choice(["near the", "beside the", "not far from the", "behind the"])
    house = w.rng.choice(["house", "hut", "cottage"])
    colour = w.pick(COLOURS)
    w.say(f"{h.he} lived in a small {house} with {article(colour)} door {side} {w.home}.")
    w.note(f"What colour was the door of {h.name}'s {house}?", f"{colour}.", f"the door was {colour}.")
    w.note(f"Where did {h.name} live?", f"{side} {w.home}.", f"{h.name} lived {side} {w.home}.")
    if w.rng.random() < 0.6:
        age = w.pick(NUMBERS)
        w.say(f"{h.name} was {age} years old.", f"that year {h.he} was {age} years old.")
        w.note(f"How old was {h.name}?", f"{age} years old.", f"{h.name} was {age} years old.")
    w.say(
        f"{h.his} best friend was {f.name}, {article(f.trait)} {f.kind}.",
        f"{h.he} had a friend, {article(f.kind)} named {f.name}.",
    )
    w.note(f"Who was the best friend of {h.name}?", f"{f.name}, the {f.kind}.", f"{h.name}'s best friend was {f.name}.")


def keep_pet(w: World) -> None:
    """A pet and its name."""
    owner = w.rng.choice([w.hero, w.friend])
    pet, name, colour = w.pick(PETS), w.pick(PET_NAMES), w.pick(COLOURS)
    w.say(
        f"{owner.name} had {article(colour)} {pet} called {name}.",
        f"with {owner.name} lived {article(colour)} {pet} whose name was {name}.",
    )
    w.say(
        f"{name} followed {owner.him} everywhere.",
        f"the {pet} slept beside {owner.his} bed.",
        f"{name} was always hungry.",
    )
    w.note(f"What was the name of {owner.name}'s {pet}?", f"{name}.", f"the {pet} was called {name}.")
    w.note(f"What colour was the {pet}?", f"{colour}.", f"{name} the {pet} was {colour}.")


def hide_thing(w: World) -> None:
    """A thing is put somewhere, and nobody must forget where."""
    who = w.rng.choice([w.hero, w.friend])
    thing = f"{w.pick(COLOURS)} {w.pick(THINGS)}"
    box = f"{w.pick(MATERIALS)} {w.pick(CONTAINERS)}"
    time = w.rng.choice(TIMES)
    if w.rng.random() < 0.5:
        where = f"in the {box}"
        w.say(
            f"one {time} {who.name} put the {thing} in the {box}.",
            f"that {time} {who.name} took {article(thing)} and laid it in the {box}.",
        )
    else:
        where = w.pick(HIDING)
        w.say(
            f"one {time} {who.name} hid the {thing} {where}.",
            f"that {time} {who.he} found {article(thing)}, and {who.name} hid it {where}.",
        )
    w.say(
        f'"I must not forget where it is," {who.he} said.',
        "nobody else saw it.",
        f'"There it is safe," thought {who.name}.',
    )
    w.note(f"Where was the {thing}?", f"{where}.", f"the {thing} was {where}.")
    w.note(f"Who put the {thing} there?", f"{who.name}.", f"{who.name} put the {thing} {where}.")


def count_food(w: World) -> None:
    """Somebody gathers things to eat and gives some away."""
    who, other = w.rng.sample([w.hero, w.friend], 2)
    food = w.pick(FOODS)
    total = w.rng.randrange(2, len(NUMBERS))
    given = w.rng.randrange(0, total - 1)
    verb = w.rng.choice(["found", "bought", "gathered", "brought"])
    w.say(
        f"{who.name} {verb} {NUMBERS[total]} {plural(food)} and put them on the table.",
        f"in the {w.place} {who.name} {verb} {NUMBERS[total]} {plural(food)}.",
    )
    w.note(
        f"How many {plural(food)} did {who.name} have at first?",
        f"{NUMBERS[total]}.",
        f"{who.name} had {NUMBERS[total]} {plural(food)}.",
    )
    left = total - given
    w.say(
        f"{who.he} gave {NUMBERS[given]} of them to {other.name}.",
        f'"Take {NUMBERS[given]} of them," {who.he} said to {other.name}.',
    )
    rest = f"one {food}" if left == 1 else f"{NUMBERS[left - 2]} {plural(food)}"
    w.say(f"so {rest} {'was' if left == 1 else 'were'} left.", f"then {who.he} had only {rest}.")
    w.note(
        f"How many {plural(food)} did {who.name} give away?",
        f"{NUMBERS[given]}.",
        f"{who.name} gave away {NUMBERS[given]} {plural(food)}.",
    )


def travel(w: World) -> None:
    """On to the next place, in some weather."""
    h, f = w.hero, w.friend
    place, weather = w.pick(PLACES), w.rng.choice(WEATHER)
    w.say(
        f"the next day was {weather}, and the two friends went to the {place}.",
        f"on {article(weather)} {w.rng.choice(TIMES)} {h.name} and {f.name} walked to the {place}.",
        f'then {h.name} said, "Let us go to the {place}." It was {article(weather)} day.',
    )
    w.say(
        f"the way from the {w.place} was long.",
        f"they sang all the way to the {place}.",
        f"{f.name} walked in front, and {h.name} came behind.",
        f"near the {place} they sat down and rested.",
    )
    w.note(
        f"What was the weather like when they went to the {place}?",
        f"It was {weather}.",
        f"it was {article(weather)} day.",
    )
    w.place = place


def feel(w: World) -> None:
    """A feeling and its reason, and what the other does about it."""
    who, other = w.rng.sample([w.hero, w.friend], 2)
    feeling = w.rng.choice(list(WHY_SAD))
    why = w.rng.choice(WHY_SAD[feeling])
    w.say(
        f"{who.name} was {feeling} because {who.he} {why}.",
        f'"Why are you so {feeling}?" asked {other.name}. {who.name} {why}.',
    )
    w.say(
        f"{other.name} sat down beside {who.him} and told {who.him} a story.",
        f'"Do not worry," said {other.name}. "I will help you."',
        f"{other.name} gave {who.him} a cup of warm milk.",
        f"soon {who.he} felt better, because {other.name} was {other.trait}.",
    )
    w.note(
        f"Why was {who.name} {feeling}?",
        f"because {who.he} {why}.",
        f"{who.name} was {feeling} because {who.he} {why}.",
    )


def meet_helper(w: World) -> None:
    """A stranger gives the hero something useful."""
    h, s = w.hero, w.helper
    thing = f"{w.pick(MATERIALS)} {w.pick(THINGS)}"
    w.say(
        f"in the {w.place} they met {article(s.trait)} {s.kind} called {s.name}.",
        f"at the {w.place} {article(s.kind)} was waiting. {s.his} name was {s.name}.",
    )
    w.say(
        f'"Where are you going?" asked {s.name}.',
        f'"Good {w.rng.choice(TIMES)}," said {s.name}. "You look {w.rng.choice(FEELINGS)}."',
    )
    w.say(
        f"{s.name} gave {h.name} {article(thing)}.",
        f'"Take this {thing}," said {s.name} to {h.name}. "You will need it."',
    )
    w.note(f"Who gave {h.name} the {thing}?", f"{s.name}, the {s.kind}.", f"{s.name} gave {h.name} the {thing}.")
    w.note(f"Where did they meet {s.name}?", f"in the {w.place}.", f"they met {s.name} in the {w.place}.")


def secret_word(w: World) -> None:
    """A gate, and the word that opens it."""
    teller, asker = w.rng.sample([w.hero, w.friend], 2)
    word = w.pick(SECRETS)
    w.say(
        f'"The secret word is {word}," whispered {teller.name}. "Tell nobody."',
        f"{teller.name} knew the secret word of the {w.place}. It was {word}.",
    )
    w.say(f"{asker.name} said it three times so as not to forget it.", f"{asker.name} nodded and kept the secret.")
    w.note("What was the secret word?", f"{word}.", f"the secret word was {word}.")


def meal(w: World) -> None:
    """What somebody likes to eat, and eats."""
    who = w.rng.choice([w.hero, w.friend])
    dish = w.pick(DISHES)
    w.say(
        f"in the {w.rng.choice(TIMES)} they ate {dish}, because that was what {who.name} liked best.",
        f"{who.name} was hungry, so they made {dish}. Nothing tasted better to {who.him}.",
    )
    w.note(f"What did {who.name} like to eat best?", f"{dish}.", f"{who.name} liked {dish} best.")


def lose_and_find(w: World) -> None:
    """Something is lost and found again, by looking in the wrong places first."""
    who, other = w.rng.sample([w.hero, w.friend], 2)
    thing = f"{w.pick(MATERIALS)} {w.pick(THINGS)}"
    wrong, right = w.rng.sample(HIDING, 2)
    w.say(f"suddenly {who.name} could not find {who.his} {thing}.", f'"My {thing} is gone!" cried {who.name}.')
    w.say(f"they looked {wrong}, but it was not there.", f"{other.name} searched {wrong} and found only dust.")
    w.say(f"at last {other.name} found it {right}.", f"then {other.name} looked {right}, and there it was.")
    w.note(f"Who found the {thing}?", f"{other.name}.", f"{other.name} found the {thing}.")
    w.note(f"Where did {other.name} find the {thing}?", f"{right}.", f"{other.name} found it {right}.")


def trouble(w: World) -> None:
    """Weather, a river or a beast, and courage."""
    h, f = w.hero, w.friend
    brave, saved = w.rng.sample([h, f], 2)
    w.say(
        "suddenly the wind blew hard and the sky turned black.",
        f"a big wave came over the {w.place}.",
        "then they heard a loud noise in the dark.",
        "the bridge broke with a crack.",
    )
    w.say(
        f"{saved.name} fell into the water, but {brave.name} held {saved.his} hand.",
        f"{saved.name} wanted to run away, but {brave.name} was not afraid.",
        f"{brave.name} lit a lamp and led {saved.name} out of the {w.place}.",
    )
    w.say(f'"Thank you," said {saved.name}. "You saved me."', f"{saved.name} never forgot it.")
    w.note(f"Who saved {saved.name}?", f"{brave.name}.", f"{brave.name} saved {saved.name}.")


def remember(w: World) -> None:
    """A fact of before comes up in talk."""
    if not w.facts:
        return
    fact = w.rng.choice(w.facts)
    asker, teller = w.rng.sample([w.hero, w.friend, w.helper][: 3 if "helper" in w.used else 2], 2)
    answer = w.rng.choice([fact.short, fact.full])
    w.say(
        f'"{fact.question}" asked {asker.name}. "{answer[:-1]}," said {teller.name}.',
        f'{asker.name} thought for a while. "{fact.question}" {teller.name} remembered. "{answer}"',
    )


def ending(w: World) -> None:
    """Home again."""
    h, f = w.hero, w.friend
    w.say(
        f"when the moon rose, {h.name} and {f.name} went home to the house near the {w.home}.",
        "at last they came home, tired and happy.",
        f"in the end {h.name} was happy again.",
    )
    w.say(
        f"{h.name} had learned that a friend like {f.name} is worth more than gold.",
        f"and they lived happily beside the {w.home} for many years.",
        f'"What a day!" said {f.name}, and they both laughed.',
        f"{h.name} fell asleep and dreamed of the {w.place}.",
    )


SCENES = [keep_pet, hide_thing, count_food, travel, feel, meet_helper, secret_word, meal, lose_and_find, trouble]


# documents


def tell(rng: random.Random, scenes: int) -> World:
    """One story of so many scenes; the world at its end holds the lines and the facts."""
    taken: set[str] = set()
    home, place = rng.sample(PLACES, 2)
    world = World(rng, person(rng, taken), person(rng, taken), person(rng, taken), home, place, used={home, place})
    opening(world)
    deck: list[Callable[[World], None]] = []
    for _ in range(scenes):
        deck = deck or rng.sample(SCENES, len(SCENES))
        scene = deck.pop()
        if scene is meet_helper and "helper" in world.used:
            continue
        scene(world)
        if scene is meet_helper:
            world.used.add("helper")
        if rng.random() < 0.45:
            remember(world)
    ending(world)
    return world


def turns(rng: random.Random, max_scenes: int = 12) -> list[str]:
    """One document as turns of a talk: a story alone, or request, story, question, answer, question, answer ..."""
    scenes = rng.randint(2, max_scenes) if rng.random() < 0.85 else rng.randint(max_scenes, 3 * max_scenes)
    world = tell(rng, scenes)
    story = " ".join(world.lines)
    if rng.random() < 0.35:
        return [story]
    h, f = world.hero, world.friend
    request = rng.choice(
        [
            f"Tell me a story about {h.name} and {f.name}.",
            f"Tell me a story about {article(h.kind)} named {h.name}.",
            "Tell me a story.",
            f"I want to hear about the {world.home}.",
            f"Tell me about {h.name} the {h.kind}.",
        ]
    )
    talk = [request, story]
    for fact in rng.sample(world.facts, min(len(world.facts), rng.randint(1, 5))):
        talk += [fact.question, fact.short if rng.random() < 0.5 else fact.full]
    return talk


def as_text(talk: list[str]) -> str:
    """A document as plain text: the story, or lines that start with ``User:`` and ``Bot:``."""
    if len(talk) == 1:
        return talk[0]
    return "\n".join(("Bot: " if i % 2 else "User: ") + text for i, text in enumerate(talk))


def texts(seed: int, max_scenes: int = 12) -> Iterator[list[str]]:
    """Documents without end."""
    rng = random.Random(seed)
    while True:
        yield turns(rng, max_scenes)
