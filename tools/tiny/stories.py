"""Short stories from a grammar: every story has a beginning, a trouble and an end.

Names, pronouns, the place and the object stay the same throughout, because all beats are told about one `Cast`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.tiny import plots, world
from tools.tiny.cast import Cast
from tools.tiny.plots import Beats


def outlines(cast: Cast, plot: Callable[[Cast], Beats]) -> list[Beats]:
    """Returns the beats of a story with this plot, once with its place described and once without."""
    opening, ending = plots.opening(cast), plots.ending(cast)
    return [[opening, plots.setting(cast), *plot(cast), ending], [opening, *plot(cast), ending]]


def tell(rng: random.Random, cast: Cast, say_place: bool = False) -> str:
    """Tells one story about the cast, with one plot and one wording drawn from `rng`.

    The place is always described with `say_place`, and most of the time without it.
    """
    with_place, without = outlines(cast, rng.choice(plots.PLOTS))
    beats = with_place if rng.random() < 0.7 or say_place else without
    return " ".join(rng.choice(beat) for beat in beats)


def request(rng: random.Random, cast: Cast) -> tuple[str, tuple[str, ...]]:
    """Asks for a story.

    Returns the request and the words from it that the story must use (hero's name, kind, place, object).
    """
    h = cast.hero
    kind = h.kind
    verb = rng.choice(
        ["Tell me a story", "Write a story", "Tell a story", "Write a short story", "Please tell me a story"]
    )
    form = rng.randrange(8)
    if form == 0:
        return f"{verb}.", ()
    if form == 1:
        return f"{verb} about {world.article(kind)}.", (kind,)
    if form == 2:
        return f"{verb} about {h.name}.", (h.name,)
    if form == 3:
        return f"{verb} about {world.article(kind)} named {h.name}.", (h.name, kind)
    if form == 4:
        return f"{verb} about {h.name} the {kind} and {cast.a_toy}.", (h.name, kind, cast.color, cast.thing)
    if form == 5:
        return f"{verb} about {world.article(kind)} named {h.name} {cast.where}.", (h.name, kind, cast.place)
    if form == 6:
        return f"{verb} with {cast.a_thing} in it.", (cast.thing,)
    return (
        f"{verb} about {world.article(kind)} named {h.name}, {world.article(cast.friend.kind)} named "
        f"{cast.friend.name} and {cast.a_thing}.",
        (h.name, kind, cast.friend.name, cast.friend.kind, cast.thing),
    )
