"""Documents to train on: conversations mixed from all tasks, and stories as plain text.

Everything here is drawn from a `random.Random`, so a seed names a document. What a document may contain is
split in two that never meet: the training side and the held-out side.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer

from tools.tiny import questions, stories, tasks, world
from tools.tiny.cast import Cast, draw_cast
from tools.tiny.tasks import Exchange, Message
from tools.tiny.tokenizer import BOS_ID, END_ID, ROLE_IDS

# Share of documents, not of tokens: a sum is short and a story long.
_MIX = {"addition": 40, "json": 18, "code_word": 15, "repeat": 14, "story": 13, "question": 13}

# Loss weight of an assistant's token. Most tokens of a story are free choices among wordings, while the other
# tasks have one right answer. A user's words get a little weight, which helps copying to emerge.
_WEIGHT = {"addition": 2.0, "json": 1.5, "code_word": 2.0, "repeat": 1.0, "story": 0.5, "question": 1.0}
_USER_WEIGHT = 0.1
_PLAIN_WEIGHT = 0.5


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Token ids of one document, and how much the prediction of each token counts in the loss."""

    tokens: list[int]
    weights: list[float]


def story_exchange(rng: random.Random) -> Exchange:
    """Asks for a story and tells it; `must_use` holds the words from the request that the story has to use."""
    cast = draw_cast(rng)
    asked, must_use = stories.request(rng, cast)
    told = stories.tell(rng, cast, say_place=cast.place in must_use)
    return Exchange("story", _story_key(cast), (("user", asked), ("assistant", told)), must_use)


def _story_key(cast: Cast) -> str:
    return f"{cast.hero.name} {cast.hero.kind} {cast.place} {cast.toy} {cast.friend.name}"


def question_exchange(rng: random.Random) -> Exchange:
    """Asks about the tiny world; sometimes the system message gives the assistant another name."""
    if rng.random() < 0.06:
        name = rng.choice(world.GIRLS + world.BOYS)
        asked = rng.choice(["Who are you?", "What is your name?"])
        messages = (("system", f"Your name is {name}."), ("user", asked), ("assistant", f"I am {name}."))
        return Exchange("question", f"{name} {asked}", messages)
    asked, answer = questions.ask(rng)
    return Exchange("question", asked, (("user", asked), ("assistant", answer)))


def _filler_words(rng: random.Random, length: int) -> int:
    """Draws how many words stand between the code word and the question: none, or up to a row's length."""
    return 0 if rng.random() < 0.35 else int((length - 80) * 0.75 * rng.random() ** 1.5)


def draw_exchange(rng: random.Random, task: str, length: int, held_out: bool) -> Exchange:
    """Draws an exchange about `task` from one side of the split; questions have no held-out side.

    `length` bounds the filler of code word tasks and the lists to repeat, in tokens.
    """
    makers: dict[str, Callable[[], Exchange]] = {
        "addition": lambda: tasks.addition(rng),
        "json": lambda: tasks.json_template(rng),
        "code_word": lambda: tasks.code_word_recall(rng, _filler_words(rng, length)),
        "repeat": lambda: tasks.repeat(rng, max(2, length // 12)),
        "story": lambda: story_exchange(rng),
        "question": lambda: question_exchange(rng),
    }
    while True:
        exchange = makers[task]()
        if task == "question" or is_held_out(exchange) == held_out:
            return exchange


def is_held_out(exchange: Exchange) -> bool:
    """Says on which side of the split an exchange is."""
    if exchange.task == "addition":
        first, second = exchange.key.split("+")
        return (int(first), int(second)) in tasks.held_out_pairs()
    return tasks.held_out(f"{exchange.task} {exchange.key}")


def _draw_task(rng: random.Random) -> str:
    return rng.choices(list(_MIX), list(_MIX.values()))[0]


def draw_conversation(rng: random.Random, length: int) -> list[tuple[str, Message]]:
    """Draws a training conversation: its messages, each with the task it belongs to."""
    first = draw_exchange(rng, _draw_task(rng), length, held_out=False)
    parts = [(first.task, message) for message in first.messages]
    if first.messages[0][0] != "system" and rng.random() < 0.12:
        parts.insert(0, (first.task, ("system", rng.choice(tasks.SYSTEM_PROMPTS))))
    extra = rng.choice([1, 2, 3]) if rng.random() < (0.5 if first.task == "addition" else 0.2) else 0
    # A code word told at the start is asked for after everything else.
    last: list[tuple[str, Message]] = []
    if first.task == "code_word" and extra and len(parts) > 3:
        parts, last = parts[:-2], parts[-2:]
    for _ in range(extra):
        task = "addition" if first.task == "addition" and rng.random() < 0.7 else _draw_task(rng)
        if task == "code_word" and any(known == "code_word" for known, _ in parts):
            continue  # two code words in one context would make the question ambiguous
        more = draw_exchange(rng, task, length // 2, held_out=False)
        if more.messages[0][0] != "system":
            parts.extend((more.task, message) for message in more.messages)
    return parts + last


class DocumentEncoder:
    """Turns documents into tokens exactly as the chat template and the tokenizer's post-processor would."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def conversation(self, parts: list[tuple[str, Message]]) -> Encoded:
        """Encodes messages; the assistant's text and its end carry the weight of their task."""
        tokens, weights = [BOS_ID], [0.0]
        for task, (role, content) in parts:
            ids = self._encode(content)
            answer = role == "assistant"
            weight = _WEIGHT[task] if answer else _USER_WEIGHT
            tokens += [ROLE_IDS[role], *ids, END_ID]
            weights += [0.0, *[weight] * len(ids), weight if answer else 0.0]
        return Encoded(tokens, weights)

    def plain(self, text: str) -> Encoded:
        """Encodes a text without chat markup."""
        ids = self._encode(text)
        return Encoded([BOS_ID, *ids, END_ID], [0.0, *[_PLAIN_WEIGHT] * (len(ids) + 1)])

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens, without special ones."""
        return self._tokenizer.decode(tokens)

    def prompt(self, messages: tuple[Message, ...]) -> list[int]:
        """Encodes messages and the token that starts the assistant's answer."""
        tokens = [BOS_ID]
        for role, content in messages:
            tokens += [ROLE_IDS[role], *self._encode(content), END_ID]
        return [*tokens, ROLE_IDS["assistant"]]


def draw_plain_story(rng: random.Random, held_out: bool = False) -> str:
    """Draws a story from one side of the split."""
    while True:
        cast = draw_cast(rng)
        if tasks.held_out("story " + _story_key(cast)) == held_out:
            return stories.tell(rng, cast)


def tokenizer_corpus(seed: int, documents: int) -> Iterator[str]:
    """Yields the texts that the tokenizer's merges are learned from."""
    for index in range(documents):
        rng = random.Random(f"tokenizer/{seed}/{index}")
        if rng.random() < 0.3:
            yield draw_plain_story(rng)
            continue
        for _, (_, content) in draw_conversation(rng, 256):
            yield content
