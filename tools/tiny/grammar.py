"""Checks a story against the grammar: is there a cast and a plot that could have told exactly this?

A story that passes is fluent, stays with its hero, friend, place and object, and uses the right pronouns.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from tools.tiny import stories, world
from tools.tiny.cast import Cast, Person
from tools.tiny.plots import PLOTS

_HERO = re.compile(r"(?:\ban? )(\w+) (\w+) (?:named|called) (\w+)")
_HERO_FIRST = re.compile(r"^(\w+) was an? (\w+) (\w+)")
_FRIEND = re.compile(r"\b[Aa]n? (\w+)(?: named | came along\. (?:He|She) was called )(\w+)")


def _candidates(story: str) -> Iterable[Cast]:
    """Yields every cast that the words of the story leave possible."""
    first = _HERO_FIRST.match(story)
    named = _HERO.search(story)
    if first:
        name, trait, kind = first.groups()
    elif named:
        trait, kind, name = named.groups()
    else:
        return
    friends = {(kind, name) for kind, name in _FRIEND.findall(story)}
    things = [thing for thing in world.OBJECTS if thing in story]
    colors = [color for color in world.COLORS if color in story] or ["red"]
    places = [place for place, words in world.PLACES.items() if any(part in story for part in words)]
    genders = itertools.product((True, False), repeat=2)
    for (her, other), friend, thing, color, place in itertools.product(
        genders, friends, things, colors, places or ["forest"]
    ):
        yield Cast(Person(name, kind, her), Person(friend[1], friend[0], other), trait, place, thing, color)


def _tells(story: str, beats: list[list[str]]) -> bool:
    """Says whether the story is one sentence (or more) from each beat in turn, joined by spaces."""
    text = story + " "
    reached = {0}
    for beat in beats:
        reached = {at + len(way) + 1 for at in reached for way in beat if text.startswith(way + " ", at)}
    return len(text) in reached


def derivation(story: str) -> Cast | None:
    """Returns a cast that the grammar could have told this story about, or None where there is none."""
    for cast in _candidates(story):
        if cast.trait not in world.TRAITS or cast.hero.name == cast.friend.name:
            continue
        for plot in PLOTS:
            for beats in stories.outlines(cast, plot):
                if _tells(story, beats):
                    return cast
    return None
