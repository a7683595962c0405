"""The tasks with one right answer: adding, filling a JSON template, recalling a code word, repeating words.

Each maker returns an `Exchange`: the messages of a conversation whose last message is the only right answer.
What the training run never sees is decided by `held_out_pair` for sums and by `held_out` for the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random

from tools.tiny import stories, world
from tools.tiny.cast import draw_cast
from tools.tiny.words import code_word, made_up_name

Message = tuple[str, str]  # role, content

SYSTEM_PROMPTS = (
    "You are a friendly assistant.",
    "You are a helpful assistant.",
    "You are Tiny, a small model.",
    "Answer kindly and in few words.",
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A conversation about one task. `key` names what was asked; equal keys ask for the same thing."""

    task: str
    key: str
    messages: tuple[Message, ...]
    must_use: tuple[str, ...] = ()


def held_out(key: str) -> bool:
    """Says whether a conversation with this key is kept from training (one key in thirty-two)."""
    return hashlib.sha256(key.encode()).digest()[0] % 32 == 0


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """Returns the sums kept from training: 500 unordered pairs of numbers below 100, in both orders."""
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    chosen = random.Random("held-out sums").sample(pairs, 500)
    return frozenset(chosen) | frozenset((b, a) for a, b in chosen)


def addition(rng: random.Random, a: int | None = None, b: int | None = None) -> Exchange:
    """Asks for `a + b`, both drawn below 100 where not given; the answer restates the sum."""
    a = rng.randrange(100) if a is None else a
    b = rng.randrange(100) if b is None else b
    total = a + b
    if rng.random() < 0.15:
        name = rng.choice(world.GIRLS + world.BOYS)
        item = rng.choice(["apples", "shells", "coins", "books", "berries", "buttons"])
        question = f"{name} has {a} {item} and finds {b} more. How many {item} does {name} have?"
        answer = f"{a} + {b} = {total}, so {name} has {total} {item}."
    else:
        question = rng.choice(
            [
                f"What is {a} + {b}?",
                f"{a} + {b} =",
                f"{a} + {b}",
                f"{a}+{b}=",
                f"{a} + {b} = ?",
                f"Add {a} and {b}.",
                f"What is {a} plus {b}?",
                f"How much is {a} + {b}?",
                f"Please add {a} and {b}.",
                f"What is {a}+{b}?",
            ]
        )
        answer = f"{a} + {b} = {total}"
    return Exchange("addition", f"{a}+{b}", (("user", question), ("assistant", answer)))


def _json_fields(rng: random.Random, made_up: bool) -> dict[str, tuple[str | int, list[str]]]:
    """Draws a person's fields: the value, and ways to say it as a part of a sentence about the person."""
    name = made_up_name(rng) if made_up else rng.choice(world.GIRLS + world.BOYS)
    age = rng.randint(2, 99)
    city = made_up_name(rng) if made_up and rng.random() < 0.5 else rng.choice(world.CITIES)
    job, pet = rng.choice(world.JOBS), rng.choice(world.PETS)
    food, color, hobby = rng.choice(world.FOODS), rng.choice(world.COLORS), rng.choice(world.HOBBIES)
    return {
        "name": (name, []),
        "age": (age, [f"is {age} years old", f"is {age}"]),
        "city": (city, [f"lives in {city}", f"comes from {city}", f"is from {city}"]),
        "job": (job, [f"works as {world.article(job)}", f"is {world.article(job)}"]),
        "pet": (pet, [f"has {world.article(pet)}", f"owns {world.article(pet)}"]),
        "food": (food, [f"likes to eat {food}", f"eats {food}"]),
        "color": (color, [f"likes the color {color}", f"loves {color}"]),
        "hobby": (hobby, [f"enjoys {hobby}", f"likes {hobby}"]),
    }


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def json_template(rng: random.Random, made_up: bool | None = None) -> Exchange:
    """Gives a description and a JSON template to fill; a field that the description leaves out becomes null."""
    fields = _json_fields(rng, rng.random() < 0.3 if made_up is None else made_up)
    others = rng.sample([field for field in fields if field != "name"], rng.randint(1, 4))
    told = others[:-1] if len(others) > 1 and rng.random() < 0.2 else others
    asked = ["name", *others]
    if rng.random() < 0.5:
        rng.shuffle(asked)
    template = json.dumps({field: 0 if field == "age" else "" for field in asked})
    filled = json.dumps({field: fields[field][0] if field in ("name", *told) else None for field in asked})
    told = rng.sample(told, len(told))
    description = f"{fields['name'][0]} {_join([rng.choice(fields[field][1]) for field in told])}."
    question = rng.choice(
        [
            f"Fill in this JSON: {template} {description}",
            f"{description} Fill in: {template}",
            f"Fill in the JSON template {template} from this text: {description}",
            f"Text: {description} Template: {template}",
        ]
    )
    return Exchange("json", description + template, (("user", question), ("assistant", filled)))


_WORDS = (
    *world.GIRLS, *world.BOYS, *world.CITIES, *world.COLORS, *world.OBJECTS, *world.PLACES, *world.ANIMALS,
    *world.JOBS, *world.FOODS, *world.HOBBIES, *world.TRAITS, *world.OPPOSITES, *world.DAYS, *world.MONTHS,
)  # fmt: skip


def repeat(rng: random.Random, longest: int) -> Exchange:
    """Asks to repeat two to `longest` words, in which known words, numbers and code words are mixed at random.

    Every token of the answer is a copy from the context, so this is what copying is learned from.
    """
    strange = rng.choice([0.1, 0.5])
    words = [
        rng.choice([code_word(rng), made_up_name(rng), str(rng.randrange(100))])
        if rng.random() < strange
        else rng.choice(_WORDS)
        for _ in range(rng.randint(2, longest))
    ]
    text = " ".join(words)
    question = rng.choice([f"Repeat: {text}", f"Say this again: {text}", f"Repeat after me: {text}"])
    return Exchange("repeat", text, (("user", question), ("assistant", text)))


def filler(rng: random.Random, words: int) -> str:
    """Returns sentences from stories, about `words` words in all."""
    sentences: list[str] = []
    count = 0
    while count < words:
        told = stories.tell(rng, draw_cast(rng)).split(". ")
        start = rng.randrange(len(told))
        for sentence in told[start : start + 6]:
            if count >= words:
                break
            sentences.append(sentence.rstrip(".") + ".")
            count += len(sentence.split())
    return " ".join(sentences)


def code_word_recall(rng: random.Random, words: int) -> Exchange:
    """Tells a code word, then about `words` words of other text, then asks for the code word."""
    word = code_word(rng)
    told = rng.choice(
        [
            f"The code word is {word}.",
            f"Remember the code word {word}.",
            f"My code word is {word}.",
            f"Please remember this code word: {word}.",
        ]
    )
    asked = rng.choice(
        [
            "What is the code word?",
            "What was the code word?",
            "Tell me the code word.",
            "What is my code word?",
        ]
    )
    right = ("assistant", f"The code word is {word}.")
    text = filler(rng, words) if words else ""
    form = rng.random()
    if form < 0.2:
        messages: tuple[Message, ...] = (("system", told), ("user", f"{text} {asked}".strip()), right)
    elif form < 0.6:
        before = filler(rng, words // 3) if words and rng.random() < 0.3 else ""
        messages = (("user", " ".join(part for part in (before, told, text, asked) if part)), right)
    else:
        noted = ("assistant", rng.choice(["I will remember it.", "Got it."]))
        middle: tuple[Message, ...] = ()
        if text:
            middle = (("user", f"Here is a story. {text}"), ("assistant", "That is a nice story."))
        messages = (("user", told), noted, *middle, ("user", asked), right)
    return Exchange("code_word", word, messages)
