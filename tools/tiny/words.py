"""Words that no list holds: code words and made-up names, so that copying is learned and not remembered."""

from __future__ import annotations

import random

_ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "br",
    "dr",
    "kr",
    "tr",
    "st",
]
_VOWELS = ["a", "e", "i", "o", "u"]
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_DIGITS = "0123456789"


def syllables(rng: random.Random, count: int) -> str:
    """Returns `count` syllables of a consonant and a vowel."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count))


def made_up_name(rng: random.Random) -> str:
    """Returns a capitalized name of two syllables, sometimes with a closing consonant."""
    return (syllables(rng, 2) + rng.choice(["", "", "n", "l", "s"])).capitalize()


def code_word(rng: random.Random) -> str:
    """Returns a code word: two to four syllables, or three to six capital letters and digits."""
    if rng.random() < 0.5:
        return syllables(rng, rng.randint(2, 4))
    return "".join(rng.choice(_LETTERS + _DIGITS) for _ in range(rng.randint(3, 6)))
