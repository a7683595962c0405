"""The tokenizer encodes any text, and the chat template renders what was trained on."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from tools.tiny.documents import DocumentEncoder, draw_conversation, tokenizer_corpus
from tools.tiny.tokenizer import BOS_ID, SPECIAL_TOKENS, load_tokenizer, train_tokenizer

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(text=_TEXT)
def test_any_text_survives(tokenizer_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    if not any(special in text for special in SPECIAL_TOKENS):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_every_digit_is_a_token_of_its_own(tokenizer_folder: Path) -> None:
    tokens = load_tokenizer(tokenizer_folder).encode("1234 + 56 = 1290", add_special_tokens=False).tokens
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("1234561290")


def test_training_it_again_gives_the_same_tokenizer(tokenizer_folder: Path) -> None:
    again = train_tokenizer(tokenizer_corpus(0, 400), 512)
    assert again.to_str() == load_tokenizer(tokenizer_folder).to_str()


def test_the_chat_template_renders_what_was_trained_on(tokenizer_folder: Path) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = DocumentEncoder(load_tokenizer(tokenizer_folder))
    for seed in range(40):
        parts = draw_conversation(random.Random(seed), 256)
        messages = [{"role": role, "content": content} for _, (role, content) in parts]
        whole = hf.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert whole == encoder.conversation(parts).tokens
        asked = hf.apply_chat_template(
            messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert asked == encoder.prompt(tuple(message for _, message in parts[:-1]))


def test_plain_text_begins_with_bos(tokenizer_folder: Path) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = DocumentEncoder(load_tokenizer(tokenizer_folder))
    text = "Once upon a time there was a fox."
    assert hf(text)["input_ids"] == encoder.plain(text).tokens[:-1]
    assert hf(text)["input_ids"][0] == BOS_ID


def test_the_template_names_an_unknown_role(tokenizer_folder: Path) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(TemplateError, match="unknown role wizard"):
        hf.apply_chat_template([{"role": "wizard", "content": "x"}], tokenize=False)


def test_only_answers_and_a_little_of_the_questions_count(tokenizer_folder: Path) -> None:
    encoder = DocumentEncoder(load_tokenizer(tokenizer_folder))
    document = encoder.conversation(
        [("addition", ("user", "1 + 2")), ("addition", ("assistant", "1 + 2 = 3"))]
    )
    assert len(document.tokens) == len(document.weights)
    start = len(encoder.prompt((("user", "1 + 2"),)))
    assert all(weight < 0.2 for weight in document.weights[:start])
    assert all(weight > 1 for weight in document.weights[start:])
