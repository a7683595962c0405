"""The generated text: equal for equal seeds, split for good, and right."""

import json
import random
import re

import pytest

from tools.tiny import grammar, questions, stories, tasks, world
from tools.tiny.cast import draw_cast
from tools.tiny.documents import draw_conversation, draw_exchange, draw_plain_story

TASKS = ("addition", "json", "code_word", "repeat", "story", "question")


def _draw(task: str, seed: int, held_out: bool = False) -> tasks.Exchange:
    return draw_exchange(random.Random(f"{task}/{seed}"), task, 256, held_out)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_names_an_exchange(task: str) -> None:
    drawn = [_draw(task, seed) for seed in range(30)]
    assert drawn == [_draw(task, seed) for seed in range(30)]
    assert len({exchange.messages for exchange in drawn}) > 20


def test_a_seed_names_a_conversation() -> None:
    assert draw_conversation(random.Random(5), 256) == draw_conversation(random.Random(5), 256)
    assert draw_plain_story(random.Random(5)) == draw_plain_story(random.Random(5))


@pytest.mark.parametrize("task", ["addition", "json", "code_word", "repeat", "story"])
def test_what_is_held_out_is_never_trained_on(task: str) -> None:
    trained = {_draw(task, seed).key for seed in range(1500)}
    tested = {_draw(task, seed, held_out=True).key for seed in range(60)}
    assert not trained & tested
    assert all(tasks.held_out(f"{task} {key}") for key in tested) or task == "addition"


def test_conversations_hold_nothing_held_out() -> None:
    held_out = tasks.held_out_pairs()
    assert len(held_out) > 980, "500 unordered pairs in both orders, doubles once"
    for seed in range(1500):
        for task, (role, content) in draw_conversation(random.Random(seed), 256):
            if task == "addition" and role == "assistant":
                first, second = (int(number) for number in re.findall(r"\d+", content)[:2])
                assert (first, second) not in held_out


def test_the_two_orders_of_a_sum_are_on_the_same_side() -> None:
    assert all((b, a) in tasks.held_out_pairs() for a, b in tasks.held_out_pairs())


def test_sums_are_right() -> None:
    for seed in range(300):
        exchange = _draw("addition", seed)
        first, second, total = (int(number) for number in re.findall(r"\d+", exchange.messages[-1][1])[:3])
        assert first + second == total
        assert f"{first}+{second}" == exchange.key


def test_filled_templates_are_json_and_say_what_the_text_says() -> None:
    empty = 0
    for seed in range(300):
        exchange = _draw("json", seed)
        asked, answer = exchange.messages[0][1], json.loads(exchange.messages[-1][1])
        template = json.loads(asked[asked.index("{") : asked.index("}") + 1])
        assert list(answer) == list(template), "the fields keep the template's order"
        for value in answer.values():
            empty += value is None
            assert value is None or str(value) in asked
    assert empty > 10, "some fields are left out of the text and become null"


def test_a_code_word_is_told_once_and_asked_for_last() -> None:
    for seed in range(200):
        exchange = _draw("code_word", seed)
        before = " ".join(content for _, content in exchange.messages[:-1])
        assert exchange.key in before
        assert exchange.messages[-1] == ("assistant", f"The code word is {exchange.key}.")
        assert exchange.messages[-2][0] == "user"


def test_a_conversation_has_one_code_word_at_most() -> None:
    for seed in range(600):
        answers = [
            content for _, (role, content) in draw_conversation(random.Random(seed), 256)
            if role == "assistant" and content.startswith("The code word is")
        ]  # fmt: skip
        assert len(answers) <= 1


def test_stories_are_of_the_grammar_and_use_what_was_asked_for() -> None:
    for seed in range(300):
        exchange = _draw("story", seed)
        story = exchange.messages[-1][1]
        assert grammar.derivation(story) is not None, story
        assert all(word in story for word in exchange.must_use), (exchange.messages[0], story)
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", story), story


@pytest.mark.parametrize("change", ["hero", "pronoun", "thing", "order"])
def test_the_grammar_refuses_a_spoiled_story(change: str) -> None:
    for seed in range(40):
        cast = draw_cast(random.Random(seed))
        story = stories.tell(random.Random(seed), cast)
        sentences = story.split(". ")
        spoiled = {
            "hero": cast.hero.name.join(story.split(cast.hero.name)[:-1])
            + "Nobody"
            + story.split(cast.hero.name)[-1],
            "pronoun": re.sub(r"\b([Hh]e|[Ss]he)\b", "it", story, count=1),
            "thing": story.replace(cast.thing, "spoon", 1),
            "order": ". ".join([*sentences[2:-1], *sentences[:2], sentences[-1]]),
        }[change]
        assert spoiled == story or grammar.derivation(spoiled) is None, spoiled


def test_answers_about_animals_are_the_facts() -> None:
    for seed in range(600):
        asked, answer = questions.ask(random.Random(seed))
        found = re.fullmatch(r"Which is bigger, an? ([a-z]+) or an? ([a-z]+)\?", asked)
        if found:
            bigger = max(found.groups(), key=lambda kind: world.ANIMALS[kind][8])
            assert answer.lower().startswith(world.article(bigger))
