"""Who and what a story is about: a hero, a friend, a place and a coloured object."""

from __future__ import annotations

import dataclasses
import random

from tools.tiny import world
from tools.tiny.words import made_up_name


@dataclasses.dataclass(frozen=True)
class Person:
    """Someone in a story: a girl, a boy, or an animal with a name."""

    name: str
    kind: str
    she: bool

    @property
    def subject(self) -> str:
        return "she" if self.she else "he"

    @property
    def object(self) -> str:
        return "her" if self.she else "him"

    @property
    def possessive(self) -> str:
        return "her" if self.she else "his"


@dataclasses.dataclass(frozen=True)
class Cast:
    """All a plot needs; two casts that are equal describe the same story told in other words."""

    hero: Person
    friend: Person
    trait: str
    place: str
    thing: str
    color: str

    @property
    def toy(self) -> str:
        return f"{self.color} {self.thing}"

    @property
    def a_toy(self) -> str:
        return world.article(self.toy)

    @property
    def a_thing(self) -> str:
        return world.article(self.thing)

    @property
    def where(self) -> str:
        return world.PLACES[self.place][0]

    @property
    def sight(self) -> str:
        return world.PLACES[self.place][1]

    @property
    def use(self) -> str:
        return world.OBJECTS[self.thing]


def draw_person(rng: random.Random, not_named: str = "", animal: bool | None = None) -> Person:
    """Draws a person whose name differs from `not_named`; one name in eight is made up."""
    she = rng.random() < 0.5
    name = not_named
    while name == not_named:
        if rng.random() < 0.125:
            name = made_up_name(rng)
        else:
            name = rng.choice(world.GIRLS if she else world.BOYS)
    if animal is None:
        animal = rng.random() < 0.6
    kind = rng.choice(world.STORY_ANIMALS) if animal else ("girl" if she else "boy")
    return Person(name, kind, she)


def draw_cast(rng: random.Random) -> Cast:
    """Draws a hero, a friend, a place and a coloured object."""
    hero = draw_person(rng)
    friend = draw_person(rng, not_named=hero.name)
    return Cast(
        hero,
        friend,
        rng.choice(world.TRAITS),
        rng.choice(list(world.PLACES)),
        rng.choice(list(world.OBJECTS)),
        rng.choice(world.COLORS),
    )
