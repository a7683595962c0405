"""POST /v1/completions with echo, where a prompt of token ids ends inside a character."""

import pytest

from jinfer.text import Tokenizer
from tests.text.conftest import sentencepiece

TEXT = "né 🙂🙃 ok"


@pytest.fixture(scope="module")
def tokenizers():
    backend = sentencepiece()
    return {"sentencepiece": Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})}


@pytest.fixture(params=["byte_level", "sentencepiece"])
def engine(request, make_engine, tokenizers):
    engine = make_engine()
    if request.param != "byte_level":
        engine.tokenizer = tokenizers[request.param]
        engine.vocab_size = engine.tokenizer.vocab_size
    return engine


def gathered(events, content, index):
    """Text, ids and log-probabilities of a streamed choice."""
    text, block = "", {}
    for chunk in events(content):
        choice = chunk["choices"][0]
        if choice["index"] == index:
            text += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                block.setdefault(name, []).extend(values)
    return text, block


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_echo_joins_the_output(client, engine, events, logprobs, tokens_per_step):
    tokenizer, engine.tokens_per_step = engine.tokenizer, tokens_per_step
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for cut in range(1, len(ids)):
        engine.reply = ids[cut:]
        asked = {"echo": True, "max_tokens": 50, "n": 2, "logprobs": logprobs}
        whole = client.complete(ids[:cut], **asked).json()["choices"]
        stream = client.complete(ids[:cut], stream=True, **asked).content
        for choice in whole:
            assert choice["text"] == tokenizer.decode(ids) == TEXT
            text, block = gathered(events, stream, choice["index"])
            assert text == TEXT
            if logprobs is None:
                continue
            assert block == choice["logprobs"]
            for token, at in zip(block["tokens"], block["text_offset"], strict=True):
                if not token.startswith("bytes:") and token != "</s>":
                    assert TEXT[at:].startswith((token, token.lstrip(" "))), (cut, token, at)


def test_a_character_that_the_output_does_not_complete(client, engine, events):
    tokenizer = engine.tokenizer
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    for cut in range(len(ids) - 3, len(ids)):
        for reply in ([], tokenizer.encode("xy", add_special_tokens=False)):
            engine.reply = reply
            asked = {"echo": True, "max_tokens": 50}
            wanted = tokenizer.decode([*ids[:cut], *reply])
            assert wanted.startswith("\ufffd")
            assert client.complete(ids[:cut], **asked).json()["choices"][0]["text"] == wanted
            assert gathered(events, client.complete(ids[:cut], stream=True, **asked).content, 0)[0] == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_prompt(client, engine, events, stream):
    ids = engine.tokenizer.encode("né🙂", add_special_tokens=False)[:-1]
    response = client.complete(ids, echo=True, max_tokens=0, stream=stream)
    text = gathered(events, response.content, 0)[0] if stream else response.json()["choices"][0]["text"]
    assert text == engine.tokenizer.decode(ids)


def test_offsets_without_echo_count_what_the_output_completes(client, engine):
    ids = engine.tokenizer.encode("🙂ok", add_special_tokens=False)
    cut = len(ids) - 3 if len(ids) < 7 else len(ids) - 4
    engine.reply = ids[cut:]
    choice = client.complete(ids[:cut], max_tokens=50, logprobs=0).json()["choices"][0]
    assert choice["text"] == "🙂ok"
    block = choice["logprobs"]
    assert block["text_offset"][block["tokens"].index("o")] == 1


def test_stop_strings_act_in_the_output_alone(client, engine):
    ids = engine.tokenizer.encode("é🙂 ok", add_special_tokens=False)
    engine.reply = ids[len(ids) - 5 :]
    answer = client.complete(ids[: len(ids) - 5], echo=True, max_tokens=50, stop=["k"]).json()["choices"][0]
    assert answer["text"] == "é🙂 o"
    assert answer["finish_reason"] == "stop"
