# ruff: noqa: E501 (a question and its answer stay on one line)
"""Small talk and questions about the tiny world, each with its answer."""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.tiny import world

Pair = tuple[str, str]

_GREETINGS = ("Hello! How can I help you?", "Hi! What can I do for you?")
_UNKNOWN = (
    "I do not know that. I am a very small model and know only a small world.",
    "I do not know. I can tell stories, add numbers, fill in JSON and remember a code word.",
)
_STRANGE_TOPICS = [
    "the president",
    "the capital of France",
    "quantum physics",
    "the stock market",
    "the weather tomorrow",
    "a good movie",
    "how to fix a car",
    "who won the game",
    "the meaning of life",
    "how to write code in Python",
    "the news today",
    "the speed of light",
    "how engines work",
    "a recipe for pizza",
    "the history of Rome",
    "what time it is",
    "the price of gold",
    "how planes fly",
    "the tallest building",
    "who wrote this book",
]


def _greeting(rng: random.Random) -> Pair:
    asked = rng.choice(
        ["Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey!", "Good morning!", "Good evening!", "Hey there"]
    )
    return asked, rng.choice(_GREETINGS)


def _introduction(rng: random.Random) -> Pair:
    name = rng.choice(world.GIRLS + world.BOYS)
    asked = rng.choice(
        [f"Hello, I am {name}.", f"Hi, my name is {name}.", f"My name is {name}.", f"I am {name}."]
    )
    return asked, f"Hello, {name}! Nice to meet you."


def _self(rng: random.Random) -> Pair:
    return rng.choice(
        [
            (rng.choice(["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you an AI?"]),
             "I am Tiny, a small language model that lives in jinfer."),
            (rng.choice(["What can you do?", "How can you help me?", "Help", "What do you know?", "Can you help me?"]),
             "I can tell short stories, add two numbers, fill in a JSON template, remember a code word and talk about animals."),
            (rng.choice(["How are you?", "How are you today?", "How do you do?"]), "I am fine, thank you. How are you?"),
            (rng.choice(["Are you a human?", "Are you real?", "Are you a person?"]), "No, I am a small computer program."),
            (rng.choice(["How old are you?", "How big are you?"]), "I am very young and very small."),
        ]
    )  # fmt: skip


def _politeness(rng: random.Random) -> Pair:
    return rng.choice(
        [
            (
                rng.choice(["Thank you", "Thanks!", "Thank you!", "Thanks", "Thank you very much."]),
                "You are welcome!",
            ),
            (rng.choice(["Bye", "Goodbye!", "Bye!", "See you!", "Good night!"]), "Goodbye! Come back soon."),
            (
                rng.choice(["I am sad.", "I feel sad.", "I feel lonely."]),
                "I am sorry. Shall I tell you a story?",
            ),
            (rng.choice(["I am happy!", "I feel good.", "I am fine."]), "That is good to hear!"),
        ]
    )


def _animal(rng: random.Random) -> Pair:
    kind = rng.choice(list(world.ANIMALS))
    sound, home, color, food, young, legs, flies, swims, _ = world.ANIMALS[kind]
    one = world.article(kind)
    start = one.capitalize()
    return rng.choice(
        [
            (rng.choice([f"What sound does {one} make?", f"What does {one} say?"]), f"{start} {sound}."),
            (rng.choice([f"Where does {one} live?", f"What is the home of {one}?"]), f"{start} lives in {home}."
             if not home.startswith(("a farm", "the ice", "the plains")) else f"{start} lives on {home}."),
            (rng.choice([f"What color is {one}?", f"Which color does {one} have?"]), f"{start} is {color}."),
            (rng.choice([f"What does {one} eat?", f"What does {one} like to eat?"]), f"{start} eats {food}."),
            (rng.choice([f"What is a young {kind} called?", f"What is a baby {kind} called?"]), f"A young {kind} is called {world.article(young)}."),
            (rng.choice([f"How many legs does {one} have?", f"How many legs has {one}?"]), f"{start} has {legs or 'no'} legs."),
            (f"Can {one} fly?", f"Yes, {one} can fly." if flies else f"No, {one} can not fly."),
            (f"Can {one} swim?", f"Yes, {one} can swim." if swims else f"No, {one} can not swim."),
        ]
    )  # fmt: skip


def _describe(rng: random.Random) -> Pair:
    kind = rng.choice(list(world.ANIMALS))
    _, _, color, food, young, legs, _, _, _ = world.ANIMALS[kind]
    one = world.article(kind).capitalize()
    asked = rng.choice(
        [
            f"Tell me about the {kind}.",
            f"What is {world.article(kind)}?",
            f"What do you know about the {kind}?",
        ]
    )
    return (
        asked,
        f"{one} is an animal. It is {color}, has {legs or 'no'} legs and eats {food}. Its young one is called {world.article(young)}.",
    )


def _compare(rng: random.Random) -> Pair:
    first, second = rng.sample(list(world.ANIMALS), 2)
    bigger, smaller = (
        (first, second) if world.ANIMALS[first][8] > world.ANIMALS[second][8] else (second, first)
    )
    ones = world.article(first), world.article(second)
    if rng.random() < 0.5:
        return (
            f"Which is bigger, {ones[0]} or {ones[1]}?",
            f"{world.article(bigger).capitalize()} is bigger than {world.article(smaller)}.",
        )
    if rng.random() < 0.5:
        return (
            f"Which is smaller, {ones[0]} or {ones[1]}?",
            f"{world.article(smaller).capitalize()} is smaller than {world.article(bigger)}.",
        )
    answer = (
        f"Yes, {ones[0]} is bigger than {ones[1]}."
        if bigger == first
        else f"No, {ones[0]} is smaller than {ones[1]}."
    )
    return f"Is {ones[0]} bigger than {ones[1]}?", answer


def _color(rng: random.Random) -> Pair:
    if rng.random() < 0.7:
        thing, color = rng.choice(list(world.THING_COLORS.items()))
        return f"What color is {thing}?", f"{thing.capitalize()} is {color}."
    (first, second), mixed = rng.choice(list(world.MIXED_COLORS.items()))
    if rng.random() < 0.5:
        first, second = second, first
    asked = rng.choice(
        [f"What do you get when you mix {first} and {second}?", f"What color do {first} and {second} make?"]
    )
    return asked, f"{first.capitalize()} and {second} make {mixed}."


def _opposite(rng: random.Random) -> Pair:
    first, second = rng.choice(list(world.OPPOSITES.items()))
    if rng.random() < 0.5:
        first, second = second, first
    return f"What is the opposite of {first}?", f"The opposite of {first} is {second}."


def _calendar(rng: random.Random) -> Pair:
    names, unit = rng.choice([(world.DAYS, "day"), (world.MONTHS, "month")])
    at = rng.randrange(len(names))
    if rng.random() < 0.6:
        return (
            f"What {unit} comes after {names[at]}?",
            f"{names[(at + 1) % len(names)]} comes after {names[at]}.",
        )
    return f"What {unit} comes before {names[at]}?", f"{names[at - 1]} comes before {names[at]}."


def _shape(rng: random.Random) -> Pair:
    shape, sides = rng.choice(list(world.SHAPES.items()))
    return (
        f"How many sides does {world.article(shape)} have?",
        f"{world.article(shape).capitalize()} has {sides} sides.",
    )


def _number(rng: random.Random) -> Pair:
    number = rng.randrange(1, 99)
    if rng.random() < 0.5:
        return f"What number comes after {number}?", f"{number + 1} comes after {number}."
    other = (number + rng.randrange(1, 98)) % 99 + 1
    return f"Which is bigger, {number} or {other}?", (
        f"{number} and {other} are equal."
        if number == other
        else f"{max(number, other)} is bigger than {min(number, other)}."
    )


def _unknown(rng: random.Random) -> Pair:
    topic = rng.choice(_STRANGE_TOPICS)
    asked = rng.choice(
        [
            f"Tell me about {topic}.",
            f"What do you know about {topic}?",
            f"Explain {topic}.",
            f"Do you know {topic}?",
        ]
    )
    return asked, _UNKNOWN[rng.random() < 0.5]


_KINDS: tuple[tuple[Callable[[random.Random], Pair], int], ...] = (
    (_greeting, 4), (_introduction, 4), (_self, 6), (_politeness, 4), (_animal, 24), (_describe, 8), (_compare, 14),
    (_color, 6), (_opposite, 6), (_calendar, 6), (_shape, 2), (_number, 6), (_unknown, 6),
)  # fmt: skip


def ask(rng: random.Random) -> Pair:
    """Draws one question and its answer."""
    makers, weights = zip(*_KINDS, strict=True)
    return rng.choices(makers, weights)[0](rng)


def has_one_right_answer(answer: str) -> bool:
    """Says whether the question that was answered so is never answered otherwise."""
    return answer not in _GREETINGS and answer not in _UNKNOWN
