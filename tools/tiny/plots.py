"""The plots of the stories. A plot is a list of beats, and a beat is a list of ways to say one thing."""

from __future__ import annotations

from collections.abc import Callable

from tools.tiny import world
from tools.tiny.cast import Cast

Beats = list[list[str]]


def opening(c: Cast) -> list[str]:
    h, a = c.hero, world.article(f"{c.trait} {c.hero.kind}")
    return [
        f"Once upon a time there was {a} named {h.name}.",
        f"{h.name} was {a} who lived {c.where}.",
        f"One morning, {a} named {h.name} woke up early.",
        f"There once was {a} called {h.name}.",
        f"{h.name} was {a}.",
    ]


def _meet(c: Cast) -> list[str]:
    f = c.friend
    return [
        f"Then {c.hero.subject} met {world.article(f.kind)} named {f.name}.",
        f"Just then {world.article(f.kind)} came along. {f.subject.capitalize()} was called {f.name}.",
        f"Soon {world.article(f.kind)} named {f.name} came by.",
        f"Near {c.sight}, {c.hero.subject} saw {world.article(f.kind)} named {f.name}.",
    ]


def ending(c: Cast) -> list[str]:
    h, f = c.hero, c.friend
    return [
        f"From that day on, {h.name} and {f.name} were best friends.",
        f"{h.name} went home with a warm heart.",
        f"That night {h.name} fell asleep with a smile.",
        f"{h.name} and {f.name} laughed all the way home.",
        f"It was the best day {h.name} could remember.",
        f"And {h.name} never forgot that day.",
    ]


def setting(c: Cast) -> list[str]:
    h = c.hero
    return [
        f"Every day {h.subject} played {c.where}.",
        f"{h.subject.capitalize()} loved to walk {c.where} and look at {c.sight}.",
        f"One sunny day {h.subject} was {c.where}.",
        f"It was a bright day {c.where}.",
    ]


def _lost(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [
            f"{s} had {c.a_toy} and took it everywhere.",
            f"The thing {h.subject} loved most was {c.a_toy}.",
            f"For {h.possessive} birthday {h.subject} got {c.a_toy}.",
        ],
        [f"But one day the {c.thing} was gone!", f"But then {h.subject} lost the {c.thing}."],
        [f"{s} looked and looked, but it was not there.", f"{s} felt very sad and began to cry."],
        _meet(c),
        [
            f'"Why are you sad?" asked {f.name}. "I lost my {c.thing}," said {h.name}.',
            f'"I can not find my {c.thing}," said {h.name}. "I will help you," said {f.name}.',
        ],
        [
            f"They searched together, and at last they found the {c.thing} behind {c.sight}.",
            f"{f.name} looked behind {c.sight}, and there was the {c.toy}!",
        ],
        [f'"Thank you!" said {h.name}.', f"{h.name} was so happy that {h.subject} jumped for joy."],
    ]


def _found(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [
            f"Near {c.sight}, {h.subject} found {c.a_toy}.",
            f"{s} saw something {c.color} on the ground. It was {c.a_thing}!",
        ],
        [f'"Whose {c.thing} is this?" {h.subject} wondered.', f'"I must find the owner," said {h.name}.'],
        _meet(c),
        [
            f'"That is my {c.thing}!" said {f.name}. "I lost it yesterday."',
            f'{f.name} looked sad. "I lost my {c.thing}," {f.subject} said.',
        ],
        [
            f"{h.name} gave the {c.thing} back at once.",
            f'"Here it is," said {h.name}, and gave {f.object} the {c.thing}.',
        ],
        [
            f'"You are so kind," said {f.name}. "Let us play together."',
            f"{f.name} was so glad that {f.subject} gave {h.object} a big hug.",
        ],
    ]


def _wish(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [
            f"More than anything, {h.subject} wanted {c.a_toy}.",
            f"{s} dreamed of {c.a_toy}, so that {h.subject} could {c.use}.",
        ],
        [f"But {h.subject} had no money.", f"But there was no {c.thing} to be found anywhere."],
        _meet(c),
        [
            f'"We can make {c.a_thing}," said {f.name}.',
            f'"Do not be sad," said {f.name}. "We can build one together."',
        ],
        ["They worked all day long.", "They worked side by side until the sun went down."],
        [
            f"In the evening the {c.toy} was ready.",
            f"At last it was done: a fine {c.toy}!",
        ],
        [f"Now {h.name} could {c.use}.", f'"It is better than one from a shop," said {h.name}.'],
    ]


def _storm(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [f"{s} had {c.a_toy} with {h.object}.", f"{s} carried {c.a_toy}."],
        [
            "Suddenly dark clouds came and it began to rain.",
            "Then a big storm came. The wind was loud and cold.",
        ],
        [f"{s} was afraid and hid behind {c.sight}.", f"{s} shook with fear."],
        [
            f"There sat {world.article(f.kind)} named {f.name}, who was afraid too.",
            f"Somebody else was hiding there: {world.article(f.kind)} named {f.name}.",
        ],
        [
            f'"Stay with me," said {h.name}. "Together we are brave."',
            f'"We can wait together," said {f.name}.',
        ],
        [
            f"{h.name} showed {f.object} the {c.thing}, and they forgot the storm.",
            f"They looked at the {c.toy} and told each other stories.",
        ],
        ["Soon the sun came out again.", "When the rain stopped, there was a rainbow in the sky."],
    ]


def _share(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [f"{s} had a new {c.toy}.", f"One day {h.subject} got {c.a_toy} as a gift."],
        _meet(c),
        [f'"May I play with your {c.thing}?" asked {f.name}.', f'"What a fine {c.thing}!" said {f.name}.'],
        [
            f'"No, it is mine!" said {h.name}, and {f.name} went away.',
            f"But {h.name} did not want to share. {f.name} walked away slowly.",
        ],
        [f"Soon {h.name} felt lonely.", "Playing alone was not much fun."],
        [
            f'{s} ran after {f.name} and said, "I am sorry. Let us share."',
            f'"Please come back," {h.subject} called. "We can play together."',
        ],
        [f"They took turns with the {c.thing}.", f"With two, the {c.thing} was much more fun."],
    ]


def _climb(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [
            f"One day {h.possessive} {c.toy} got stuck high up.",
            f"The wind blew {h.possessive} {c.toy} far up high.",
        ],
        [f"{s} jumped, but {h.subject} could not reach it.", f"{s} tried three times, but it was too high."],
        _meet(c),
        [f'"Climb on my back," said {f.name}.', f'"Let us try together," said {f.name}.'],
        ["Up and up they went.", f"{f.name} held {h.object} as high as {f.subject} could."],
        [
            f"At last {h.name} got the {c.thing} back.",
            f"And then {h.name} had the {c.thing} in {h.possessive} hands.",
        ],
        ['"We did it!" they shouted.', f'"Two can do more than one," said {f.name}.'],
    ]


def _shy(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [f"But {h.subject} had no friends yet.", f"{s} was new there and did not know anyone."],
        [
            f"One day {h.subject} took {h.possessive} {c.toy} outside.",
            f"All day {h.subject} sat alone with {c.a_toy}.",
        ],
        _meet(c),
        [f'"Hello," said {f.name}. "Is that {c.a_thing}?"', f'"I like your {c.thing}," said {f.name}.'],
        [
            f'"Yes," said {h.name} in a small voice. "Do you want to see it?"',
            f"{h.name} smiled for the first time.",
        ],
        [
            f"They sat by {c.sight} and talked until evening.",
            f"They played with the {c.thing} until it was dark.",
        ],
        [f"Now {h.name} was not alone any more.", f'"See you tomorrow!" said {f.name}.'],
    ]


def _party(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [
            f"{s} had a friend, {world.article(f.kind)} named {f.name}.",
            f"{h.possessive.capitalize()} best friend was {world.article(f.kind)} named {f.name}.",
        ],
        [f"It was {f.name}'s birthday.", f"Tomorrow was {f.name}'s birthday."],
        [
            f"{h.name} wanted to give {f.object} {c.a_toy}.",
            f'"I will make {f.object} {c.a_toy}," thought {h.name}.',
        ],
        [f"{s} worked on it in secret.", f"{s} wrapped it in paper and hid it behind {c.sight}."],
        [f'"Surprise!" called {h.name} when {f.name} came.', f"When {f.name} came, everyone sang a song."],
        [
            f"{f.name} opened the gift and saw the {c.thing}.",
            f'"{c.a_thing.capitalize()}! How did you know?" said {f.name}.',
        ],
        [f'"Now I can {c.use}!" said {f.name}.', "They ate cake and danced."],
    ]


def _night(c: Cast) -> Beats:
    h, f, s = c.hero, c.friend, c.hero.subject.capitalize()
    return [
        [f"One night {h.subject} could not sleep.", f"At night {h.subject} heard a strange sound."],
        [f"{s} took {h.possessive} {c.toy} and went outside.", f"{s} held {h.possessive} {c.toy} tight."],
        [f"Something moved near {c.sight}.", f'"Who is there?" {h.subject} whispered.'],
        [
            f"It was only {world.article(f.kind)} named {f.name}.",
            f'"It is only me," said {world.article(f.kind)} named {f.name}.',
        ],
        [f'"I am lost," said {f.name}. "It is so dark."', f'"I can not find my way home," said {f.name}.'],
        [f'"Come with me," said {h.name}. "I know the way."', f"{h.name} took {f.object} by the hand."],
        [
            f"They walked under the stars until they came to {f.name}'s door.",
            f"Soon they saw a light. {f.name} was home.",
        ],
        [f'{f.name} said, "You are very brave."', f"{h.name} gave {f.object} the {c.thing} to keep."],
    ]


def _race(c: Cast) -> Beats:
    h, f = c.hero, c.friend
    return [
        [f"One day there was a big race {c.where}.", "Everyone came to see the great race."],
        [f"The prize was {c.a_toy}.", f"The winner would get {c.a_toy}."],
        [
            f"{h.name} ran against {world.article(f.kind)} named {f.name}.",
            f"{world.article(f.kind).capitalize()} named {f.name} wanted to win too.",
        ],
        ["They ran as fast as they could.", f"At first {f.name} was ahead."],
        [
            f"But then {f.name} fell down and hurt {f.possessive} foot.",
            f"Near {c.sight}, {f.name} tripped and fell.",
        ],
        [
            f"{h.name} stopped and helped {f.object} up.",
            f'"Are you all right?" asked {h.name}, and stopped to help.',
        ],
        [
            f"They crossed the line together and shared the {c.thing}.",
            f'Both of them won the {c.thing}. "You are a true friend," said {f.name}.',
        ],
    ]


PLOTS: tuple[Callable[[Cast], Beats], ...] = (
    _lost, _found, _wish, _storm, _share, _climb, _shy, _party, _night, _race,
)  # fmt: skip
