"""Held-out loss and exact match per task, and how often the draft's choice is the main model's.

Where there is one right answer, greedy decoding gives exactly that answer if and only if the most likely token at
each of its positions is the right one, the final <|end|> included. So one forward pass per example measures
exact match. Stories have many right answers: they are generated, and checked against the grammar.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tools.tiny import documents, grammar, questions, tasks
from tools.tiny.documents import DocumentEncoder, draw_plain_story
from tools.tiny.model import Params, TinyConfig, forward
from tools.tiny.tasks import Exchange
from tools.tiny.tokenizer import END_ID, PAD_ID

_LENGTHS = (32, 64, 128, 256, 512, 1024)
_TOKENS_PER_CALL = 8192
_STORY_TOKENS = 200


@dataclasses.dataclass(frozen=True)
class Model:
    """A network to measure; parameters are float32."""

    config: TinyConfig
    params: Params


@dataclasses.dataclass(frozen=True)
class Score:
    """What was measured on one set: exact match and agreement are shares, the loss is nats per answer token."""

    examples: int
    loss: float
    exact: float | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class _Example:
    tokens: list[int]
    answer_start: int  # the answer is tokens[answer_start:], its <|end|> included


@functools.partial(jax.jit, static_argnums=0)
def _judge(config: TinyConfig, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each position's most likely next token, and the loss of the token that follows, both `[B, T-1]`."""
    logits = forward(params, tokens, config)[:, :-1]
    return jnp.argmax(logits, -1), optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def _padded(examples: list[_Example]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields example numbers and their tokens as an int32 array, in batches of few distinct shapes."""
    groups: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        length = next(length for length in _LENGTHS if length >= len(example.tokens))
        groups.setdefault(length, []).append(number)
    for length, numbers in sorted(groups.items()):
        rows = _TOKENS_PER_CALL // length
        for begin in range(0, len(numbers), rows):
            chosen = numbers[begin : begin + rows]
            tokens = np.full((rows, length), PAD_ID, np.int32)
            for row, number in enumerate(chosen):
                tokens[row, : len(examples[number].tokens)] = examples[number].tokens
            yield chosen, tokens


def _score(examples: list[_Example], main: Model, draft: Model | None) -> Score:
    """Measures answers token by token; with a draft, also the share of positions where both choose the same."""
    losses, exact, agreed, positions = 0.0, 0, 0, 0
    for numbers, tokens in _padded(examples):
        choices, nats = (np.asarray(x) for x in _judge(main.config, main.params, tokens))
        others = choices if draft is None else np.asarray(_judge(draft.config, draft.params, tokens)[0])
        for row, number in enumerate(numbers):
            example = examples[number]
            answer = slice(example.answer_start - 1, len(example.tokens) - 1)
            losses += float(nats[row, answer].sum())
            exact += bool((choices[row, answer] == tokens[row, 1:][answer]).all())
            agreed += int((choices[row, answer] == others[row, answer]).sum())
            positions += answer.stop - answer.start
    agreement = None if draft is None else agreed / positions
    return Score(len(examples), losses / positions, exact / len(examples), agreement)


def _encode(encoder: DocumentEncoder, exchange: Exchange) -> _Example:
    prompt = encoder.prompt(exchange.messages[:-1])
    document = encoder.conversation([(exchange.task, message) for message in exchange.messages])
    return _Example(document.tokens, len(prompt))


def held_out_exchanges(count: int) -> dict[str, list[Exchange]]:
    """Draws the test sets, `count` of each; none of them is in any training row, except the known questions."""
    pairs = sorted(tasks.held_out_pairs())
    chosen = random.Random("held-out order").sample(pairs, min(count, len(pairs)))
    return {
        "addition": [tasks.addition(random.Random(f"held-out/{a}+{b}"), a, b) for a, b in chosen],
        "json": _several("json", count),
        "json_unseen": _filtered(
            count, "unseen", lambda rng: tasks.json_template(rng, made_up=True), documents.is_held_out
        ),
        "code_word": _several("code_word", count),
        "code_word_long": _filtered(
            count // 4, "long", lambda rng: tasks.code_word_recall(rng, 450), documents.is_held_out
        ),
        "repeat": _several("repeat", count),
        "question": _filtered(
            count,
            "questions",
            documents.question_exchange,
            lambda exchange: questions.has_one_right_answer(exchange.messages[-1][1]),
        ),
        "story": _several("story", count),
    }


def _several(task: str, count: int) -> list[Exchange]:
    return [
        documents.draw_exchange(random.Random(f"held-out/{task}/{i}"), task, 256, held_out=True)
        for i in range(count)
    ]


def _filtered(
    count: int, name: str, draw: Callable[[random.Random], Exchange], keep: Callable[[Exchange], bool]
) -> list[Exchange]:
    """Draws until `count` exchanges are kept."""
    drawn = (draw(random.Random(f"held-out/{name}/{i}")) for i in itertools.count())
    return list(itertools.islice((exchange for exchange in drawn if keep(exchange)), count))


@functools.partial(jax.jit, static_argnums=0)
def _next_tokens(config: TinyConfig, params: Params, tokens: jax.Array, ends: jax.Array) -> jax.Array:
    logits = forward(params, tokens, config)
    return jnp.argmax(jnp.take_along_axis(logits, (ends - 1)[:, None, None], axis=1)[:, 0], -1)


def generate(model: Model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Decodes greedily, all prompts at once, until <|end|> or `new_tokens`; returns the new tokens without it.

    There is no cache: each step runs over all tokens so far, which is fine for a few hundred short texts.
    """
    rows = [list(prompt) for prompt in prompts]
    running = list(range(len(rows)))
    for _ in range(new_tokens):
        if not running:
            break
        longest = max(len(rows[i]) for i in running)
        width = -(-longest // 32) * 32
        tokens = np.full((len(rows), width), PAD_ID, np.int32)
        for place, i in enumerate(running):
            tokens[place, : len(rows[i])] = rows[i]
        ends = np.ones(len(rows), np.int32)
        ends[: len(running)] = [len(rows[i]) for i in running]
        count = -(-len(running) // 16) * 16  # few distinct shapes to compile
        chosen = np.asarray(_next_tokens(model.config, model.params, tokens[:count], ends[:count]))
        for place, i in enumerate(running):
            rows[i].append(int(chosen[place]))
        running = [i for i in running if rows[i][-1] != END_ID]
    answers = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [answer[:-1] if answer and answer[-1] == END_ID else answer for answer in answers]


@dataclasses.dataclass(frozen=True)
class StoryScore:
    """Of `examples` generated stories: the share that uses all that was asked for, and that the grammar accepts."""

    examples: int
    uses_request: float
    well_formed: float
    agreement: float | None


def score_stories(
    encoder: DocumentEncoder, exchanges: list[Exchange], main: Model, draft: Model | None
) -> tuple[StoryScore, list[tuple[str, str]]]:
    """Generates a story for each request; returns the score and (request, story) pairs."""
    prompts = [encoder.prompt(exchange.messages[:-1]) for exchange in exchanges]
    answers = generate(main, prompts, _STORY_TOKENS)
    texts = [encoder.decode(answer) for answer in answers]
    used = [all(word in text for word in e.must_use) for e, text in zip(exchanges, texts, strict=True)]
    formed = [grammar.derivation(text) is not None for text in texts]
    told = [_Example([*p, *a, END_ID], len(p)) for p, a in zip(prompts, answers, strict=True)]
    agreement = None if draft is None else _score(told, main, draft).agreement
    score = StoryScore(len(texts), sum(used) / len(texts), sum(formed) / len(texts), agreement)
    return score, [(e.messages[-2][1], text) for e, text in zip(exchanges, texts, strict=True)]


def held_out_loss(encoder: DocumentEncoder, main: Model, count: int) -> Score:
    """Measures plain stories of the held-out side, every token of them."""
    told = [
        encoder.plain(draw_plain_story(random.Random(f"held-out/plain/{i}"), held_out=True)).tokens
        for i in range(count)
    ]
    return dataclasses.replace(_score([_Example(tokens, 1) for tokens in told], main, None), exact=None)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that was measured, and the generated stories as (request, story)."""

    scores: dict[str, Score]
    stories: StoryScore
    samples: list[tuple[str, str]]


def evaluate(
    encoder: DocumentEncoder, main: Model, draft: Model | None, count: int, stories_count: int
) -> Report:
    """Measures everything; `count` examples per task and `stories_count` generated stories."""
    sets = held_out_exchanges(count)
    scores = {task: _score([_encode(encoder, e) for e in found], main, draft) for task, found in sets.items()}
    scores["story"] = dataclasses.replace(scores["story"], exact=None)
    scores["plain_story"] = held_out_loss(encoder, main, count)
    story_score, samples = score_stories(encoder, sets["story"][:stories_count], main, draft)
    return Report(scores, story_score, samples)
