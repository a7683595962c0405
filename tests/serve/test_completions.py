"""POST /v1/completions: every form of prompt, echo, and log-probabilities with their offsets."""

import pytest


def texts(answer):
    return [c["text"] for c in answer["choices"]]


def test_whole_answer(client, engine, reply):
    answer = client.complete("hi", max_tokens=100, model="fake").json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert texts(answer) == [reply]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert engine.seen[0].ids == engine.tokenizer.encode("hi")
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == len(engine.reply) + 1


def test_sixteen_tokens_by_default(client, engine):
    assert client.complete("hi").json()["usage"]["completion_tokens"] == 16
    engine.default_params = {"max_tokens": 5}
    assert client.complete("hi").json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("he", [[259, 256]]),
        (["he", "ld"], [[259, 256], [259, 257]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_forms_of_prompts(client, engine, prompt, ids):
    bos = engine.tokenizer.bos_id
    answer = client.complete(prompt, n=2).json()
    assert [seen.ids for seen in engine.seen] == [[bos if i == 259 else i for i in each] for each in ids]
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 2 * len(ids) * 16


def test_special_tokens_can_be_left_out(client, engine):
    client.complete("hi", add_special_tokens=False)
    assert engine.seen[0].ids == engine.tokenizer.encode("hi", add_special_tokens=False)


def test_stream(client, events, reply):
    chunks = events(client.complete("hi", max_tokens=100, stream=True).content)
    assert "".join(c["choices"][0]["text"] for c in chunks) == reply
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {c["object"] for c in chunks} == {"text_completion"}


def test_stream_of_several_prompts(client, events):
    asked = {"n": 2, "stream": True, "max_tokens": 4, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.complete(["a", "b", "c"], **asked).content)
    for index in range(6):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == "Grü"
        assert mine[-1]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 24
    assert last["usage"]["prompt_tokens"] == 6


def test_echo(client, engine):
    assert texts(client.complete("sag: ", echo=True, max_tokens=2).json()) == ["sag: Gr"]
    ids = engine.tokenizer.encode("né")
    assert texts(client.complete(ids, echo=True, max_tokens=2, n=2).json()) == ["néGr"] * 2


def test_logprobs(client, engine):
    block = client.complete("hi", logprobs=2, max_tokens=4).json()["choices"][0]["logprobs"]
    assert block["tokens"] == ["G", "r", "bytes:\\xc3", "bytes:\\xbc"]
    assert block["token_logprobs"] == [-1.5, -1.51, -1.52, -1.53]
    assert block["text_offset"] == [0, 1, 2, 2]  # ü is complete with its second byte
    # The two most likely, and the token itself, which is the third.
    assert all(len(top) == 3 for top in block["top_logprobs"])
    assert block["top_logprobs"][0]["G"] == -1.5
    only = client.complete("hi", logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert only["top_logprobs"] == [{"G": -1.5}, {"r": -1.51}]


def test_echo_with_logprobs_scores_the_prompt(client, engine):
    answer = client.complete("hü", echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert answer["text"] == "hüG"
    block = answer["logprobs"]
    assert block["tokens"] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xbc", "G"]
    assert block["token_logprobs"] == [None, -1.51, -1.52, -1.53, -1.5]
    assert block["top_logprobs"][0] is None
    assert block["text_offset"] == [0, 0, 1, 1, 2]
    assert "prompt_logprobs" not in answer


def test_special_tokens_written_in_the_prompt_have_a_length(client):
    block = client.complete("<|user|>x", echo=True, logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert block["tokens"] == ["<s>", "<|user|>", "x", "G"]
    assert block["text_offset"] == [0, 0, 8, 9]


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_asked_for(client, events, stream):
    asked = {"echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream}
    response = client.complete("hi", **asked)
    if stream:
        parts = events(response.content)
        text = "".join(c["choices"][0]["text"] for c in parts)
        block, reason = parts[0]["choices"][0]["logprobs"], parts[-1]["choices"][0]["finish_reason"]
    else:
        answer = response.json()
        assert answer["usage"]["completion_tokens"] == 0
        text, block = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
        reason = answer["choices"][0]["finish_reason"]
    assert text == "hi"
    assert reason == "length"
    assert block["tokens"] == ["<s>", "h", "i"]


def test_streamed_logprobs_are_those_of_the_whole_answer(client, events, engine):
    engine.tokens_per_step = 3
    asked = {"echo": True, "logprobs": 2, "max_tokens": 50, "n": 2}
    whole = client.complete(["one", "zwö"], **asked).json()["choices"]
    chunks = events(client.complete(["one", "zwö"], stream=True, **asked).content)
    for choice in whole:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [x for c in mine if c["logprobs"] for x in c["logprobs"][name]] == values, name


def test_offsets_point_into_the_text(client, engine):
    choice = client.complete("Grüße ", echo=True, logprobs=0, max_tokens=100).json()["choices"][0]
    block, text = choice["logprobs"], choice["text"]
    for token, offset in zip(block["tokens"], block["text_offset"], strict=True):
        if not token.startswith("bytes:") and token not in ("<s>", "</s>"):
            assert text[offset:].startswith(token), (token, offset)


def test_prompt_logprobs(client, engine):
    answer = client.complete([5, 6], prompt_logprobs=0, echo=True, logprobs=2, max_tokens=1).json()[
        "choices"
    ][0]
    assert answer["prompt_logprobs"][0] is None
    assert list(answer["prompt_logprobs"][1]) == ["6"]  # none but the token's own were asked for
    assert len(answer["logprobs"]["top_logprobs"][1]) == 3
    assert engine.seen[0].params.prompt_logprobs == 2


def test_false_asks_for_no_logprobs(client):
    assert client.complete("hi", logprobs=False).json()["choices"][0]["logprobs"] is None


def test_each_kind_of_logprobs_has_the_count_it_asked_for(client):
    asked = {"prompt_logprobs": 2, "echo": True, "logprobs": 1, "max_tokens": 1}
    answer = client.complete([5, 6], **asked).json()["choices"][0]
    assert len(answer["prompt_logprobs"][1]) == 3
    assert [top and len(top) for top in answer["logprobs"]["top_logprobs"]] == [None, 2, 2]


def test_offsets_behind_a_character_that_is_never_completed(client, engine):
    engine.reply = [*engine.tokenizer.encode("ü", add_special_tokens=False)[:1], *engine.reply]
    choice = client.complete("x", logprobs=0, max_tokens=4).json()["choices"][0]
    assert choice["text"].startswith("\ufffdGr")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_offsets_behind_a_prompt_that_the_tokenizer_shortens(client, engine, monkeypatch):
    encode = engine.tokenizer.encode
    monkeypatch.setattr(
        engine.tokenizer, "encode", lambda text, *a, **k: encode(text.replace("  ", " "), *a, **k)
    )
    choice = client.complete("a  b", echo=True, logprobs=0, max_tokens=2).json()["choices"][0]
    assert choice["text"] == "a  bGr"
    assert choice["logprobs"]["text_offset"][-2:] == [4, 5]


def test_token_ids_are_returned(client, engine, events):
    answer = client.complete([1, 2], return_token_ids=True, max_tokens=3).json()["choices"][0]
    assert answer["prompt_token_ids"] == [1, 2]
    assert answer["token_ids"] == engine.reply[:3]
    chunks = events(client.complete([1, 2], return_token_ids=True, max_tokens=3, stream=True).content)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [1, 2]
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", ())] == engine.reply[:3]


@pytest.mark.parametrize("stream_options", [None, {"include_usage": True, "continuous_usage_stats": True}])
def test_the_last_chunk_has_what_was_asked_for_and_nothing_in_it(client, events, stream_options):
    asked = {"stream": True, "logprobs": 1, "return_token_ids": True, "max_tokens": 3, "n": 2}
    chunks = events(client.complete("hi", stream_options=stream_options, **asked).content)
    lasts = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["finish_reason"]]
    assert len(lasts) == 2
    for last in lasts:
        assert last["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        assert last["token_ids"] == []
        assert last["prompt_token_ids"] is None
    # A loop that reads every chunk without a test for null.
    read = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == 1]
    assert sum(len(c["logprobs"]["tokens"]) for c in read) == sum(len(c["token_ids"]) for c in read) == 3


def test_neutral_fields_pass(client):
    neutral = {
        "best_of": 2,
        "n": 2,
        "suffix": None,
        "user": "me",
        "logit_bias": {},
        "stop": None,
        "stop_token_ids": [],
    }
    client.complete("hi", **neutral).raise_for_status()
    assert client.fault(client.complete("hi", best_of=3, n=2), 400)["param"] == "best_of"
    assert client.fault(client.complete("hi", suffix="!"), 400)["param"] == "suffix"


def test_one_prompt_refused_refuses_all(client, engine):
    engine.capacity = 2
    response = client.complete(["a", "b", "c"])
    assert client.fault(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "7"
    error = client.fault(client.complete(["x"] * 600, n=2), 400)
    assert "split" in error["message"]


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_usage_at_the_end_of_every_stream(make_client, events, options):
    """--enable-force-include-usage"""
    client = make_client(enable_force_include_usage=True)
    extra = {} if options is None else {"stream_options": options}
    for response in (client.complete("a", stream=True, **extra), client.chat(stream=True, **extra)):
        *chunks, last = events(response.content)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in chunks)
