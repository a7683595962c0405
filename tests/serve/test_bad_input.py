"""Whatever is wrong with a request: a 4xx that names it, in OpenAI's form, and the server goes on."""

import functools
import json

import httpx
import pytest

from jinfer import RequestError
from serve.fields import HARMLESS, NEUTRAL

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "user", "content": "hi"}]
DEEP_CALL = {"type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
DEEP_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": functools.reduce(lambda x, _: [x], range(150), 1)},
}


@pytest.fixture(autouse=True)
def serves_on(client):
    yield
    client.chat("still there?").raise_for_status()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages"),
        ({"messages": [*TALK, {"role": "assistant", "tool_calls": [DEEP_CALL]}]}, "messages"),
        ({"tools": [DEEP_TOOL], "tool_choice": "none"}, "tools"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": False}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"stop_token_ids": "x"}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "a"}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"surprise": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"priority": 1}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 5000}, "cache_salt"),
        ({"model": 5}, "model"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"regex": "x"}}, "structured_outputs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"temprature": 0.5}, "temprature"),
        ({"temprature": None}, "temprature"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_chat_names_the_field(client, engine, fields, param, stream):
    fields = ({"stream": True} if stream else {}) | fields
    error = client.fault(client.chat(**fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert engine.seen == []


def test_stream_options_need_a_stream(client):
    asked = {"stream_options": {"include_usage": True}}
    assert client.fault(client.chat(**asked), 400)["param"] == "stream_options"
    assert client.fault(client.complete(stream=False, **asked), 400)["param"] == "stream_options"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "left out"),
        ([], "an empty list"),
        (5, "a number"),
        ({}, "an object"),
        ([[]], "no tokens"),
        ([[1], 2], "expected a string"),
        ([1, "a"], "prompt[1] is a string"),
        ([1, True], "prompt[1] is a boolean"),
        ([1, 2.5], "prompt[1] is a number"),
        ([[1], [None]], "prompt[1][0] is null"),
        ([-1], "outside the vocabulary"),
        ([263], "outside the vocabulary"),
        ([10**40], "outside the vocabulary"),
        ([1] * 1000, "max_model_len"),
        ("x" * 1000, "max_model_len"),
        ("x" * 3_000_000, "characters"),
        (["hi", "x" * 3_000_000], "characters"),
    ],
)
def test_prompts(client, engine, prompt, words):
    error = client.fault(client.complete(prompt), 400)
    assert error["param"] == "prompt"
    assert words in error["message"]
    assert len(error["message"]) < 300
    assert engine.seen == []


def test_an_empty_prompt(client):
    assert client.fault(client.complete("", add_special_tokens=False), 400)["param"] == "prompt"
    client.complete("").raise_for_status()  # the tokenizer's BOS is a prompt


def test_a_prompt_too_long_has_openais_code(client):
    for response in (
        client.complete([1] * 5000),
        client.chat("x" * 1000),
        client.post("/v1/embeddings", {"input": [1] * 5000}),
    ):
        error = client.fault(response, 400)
        assert error["code"] == "context_length_exceeded"
        # The words by which clients know it, as OpenAI writes them.
        assert "This model's maximum context length is 1000 tokens" in error["message"]


def test_texts_too_long_by_their_characters(client):
    text = "x" * 3_000_000
    for response, param in (
        (client.chat(text), "messages"),
        (client.post("/tokenize", {"prompt": text}), "prompt"),
        (client.post("/v1/embeddings", {"input": text}), "input"),
    ):
        error = client.fault(response, 400)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")


@pytest.mark.parametrize("value", ["logprobs", 21, -1, True, 1.5])
def test_completion_logprobs(client, value):
    assert client.fault(client.complete("hi", logprobs=value), 400)["param"] == "logprobs"


RAW = {
    "malformed": b'{"prompt": ',
    "trailing comma": b'{"prompt": "hi",}',
    "empty": b"",
    "not an object": b"[1]",
    "null": b"null",
    "two values": b'{"prompt": "hi"} {}',
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "cut UTF-8": '{"prompt": "ü"}'.encode()[:-3] + b'"}',
    "UTF-16": '{"prompt": "hi"}'.encode("utf-16"),
    "NaN": b'{"prompt": "hi", "temperature": NaN}',
    "Infinity": b'{"prompt": "hi", "temperature": -Infinity}',
    "beyond floats": b'{"prompt": "hi", "temperature": 1e999}',
    "huge integer": b'{"prompt": "hi", "seed": ' + b"9" * 100_000 + b"}",
    "deep list": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "other half": b'{"prompt": "a\\udc00b"}',
    "NUL outside a string": b'{"prompt": "hi"}\x00',
    "raw newline": b'{"prompt": "a\nb"}',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_bodies_that_are_not_json(client, path, raw):
    response = client.post(path, content=raw, headers={"content-type": "application/json"})
    error = client.fault(response, 400)
    assert error["type"] == "invalid_request_error"
    assert response.content.isascii()
    assert error["code"] in ("invalid_json", "body_too_complex") or raw == RAW["beyond floats"]


def test_large_bodies_are_parsed_off_the_event_loop_and_refused_the_same(client):
    raw = b'{"prompt": "' + b"x" * 200_000 + b"\xff" + b'"}'
    response = client.post(COMPLETIONS, content=raw, headers={"content-type": "application/json"})
    assert client.fault(response, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_content_types(client, kind):
    headers = {"content-type": kind} if kind else {}
    response = client.post(COMPLETIONS, content=b'{"prompt": "hi"}', headers=headers)
    assert client.fault(response, 415)["code"] == "unsupported_media_type"
    charset = {"content-type": "application/json; charset=utf-8"}
    client.post(COMPLETIONS, content=b'{"prompt": "hi"}', headers=charset).raise_for_status()
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    client.fault(client.post(COMPLETIONS, content=b"x", headers=packed), 415)


def test_unknown_model(client):
    for response in (
        client.chat(model="gpt-9"),
        client.complete(model="gpt-9"),
        client.get("/v1/models/gpt-9"),
    ):
        error = client.fault(response, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-9" in error["message"]
    client.chat(model="").raise_for_status()
    client.chat(model=None).raise_for_status()


def test_paths_and_methods(client):
    assert client.fault(client.get("/v1/nothing"), 404)["code"] == "not_found"
    client.fault(client.get("/v1/models/"), 404)
    client.fault(client.get("/v1/completions/"), 404)
    for method, path in (("GET", CHAT), ("DELETE", "/v1/models"), ("POST", "/health"), ("OPTIONS", CHAT)):
        response = client.call(method, path)
        assert client.fault(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"]
    client.fault(client.get("/\ud800".encode("utf-8", "surrogatepass").decode("latin-1")), 404)


def test_every_neutral_value_passes(client, reply):
    for name, values in NEUTRAL.items():
        for value in (None, *values):
            answer = client.chat(**{name: value})
            assert answer.status_code == 200, (name, value, answer.text)
            assert answer.json()["choices"][0]["message"]["content"] == reply
    for name in HARMLESS:
        assert client.chat(**{name: "x"}).status_code == 200, name
    for fields in (
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"logit_bias": {}},
        {"max_tokens": 9.0},
    ):
        assert client.chat(**fields).status_code == 200, fields
    # 1 is true in Python, and no boolean in JSON.
    assert client.fault(client.chat(store=0), 400)["param"] == "store"
    assert client.fault(client.chat(length_penalty=True), 400)["param"] == "length_penalty"


def test_every_field_null_is_a_request_without_them(client, reply):
    from serve.schemas import ChatBody

    answer = client.chat(**dict.fromkeys(set(ChatBody.model_fields) - {"messages"}))
    assert answer.json()["choices"][0]["message"]["content"] == reply


def test_long_wrong_values_are_not_repeated_at_length(client):
    response = client.post(COMPLETIONS, {"prompt": "hi", "x" * 100_000: 1})
    assert len(response.content) < 1000
    assert len(client.complete("hi", stop=["y" * 100_000]).content) < 3000
    assert len(client.complete("hi", temperature="z" * 100_000).content) < 1000
    assert len(client.chat(model="m" * 100_000).content) < 1000
    assert len(client.get("/" + "p" * 10_000).content) < 3000


def test_a_template_that_refuses(client, engine):
    class Refuses:
        def tokens(self, *args, **kwargs):
            raise RequestError("roles must alternate", param="messages")

    template, engine.chat_template = engine.chat_template, Refuses()
    assert client.fault(client.chat(), 400)["message"] == "roles must alternate"
    assert client.fault(client.post("/tokenize", {"messages": TALK}), 400)["param"] == "messages"
    client.state.__dict__.pop("chat_template")
    engine.chat_template = template


def test_an_unexpected_error_says_nothing_of_itself(client, engine, caplog):
    def broken(*args, **kwargs):
        raise KeyError("secret")

    validate, engine.validate = engine.validate, broken
    response = client.complete("hi")
    engine.validate = validate
    error = client.fault(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    generate, engine.generate = engine.generate, broken
    response = client.complete("hi")
    engine.generate = generate
    assert "secret" not in response.text
    assert client.fault(response, 500)["code"] == "internal_error"
    assert len([r for r in caplog.records if r.name == "serve"]) == 1


def test_bodies_with_every_json_value_in_every_field(client):
    """No value of a known field makes a 500."""
    from serve.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

    values = [None, True, 0, -1, 1.5, 10**30, "", "x", [], [None], [[]], {}, {"a": []}]
    for path, body, base in (
        (CHAT, ChatBody, {"messages": TALK}),
        (COMPLETIONS, CompletionBody, {"prompt": "x"}),
        ("/tokenize", TokenizeBody, {"prompt": "x"}),
        ("/detokenize", DetokenizeBody, {"tokens": [1]}),
    ):
        for name in body.model_fields:
            for value in values:
                response = client.post(path, base | {name: value})
                assert response.status_code in (200, 400, 404), (path, name, value, response.text)
                if response.status_code != 200:
                    client.fault(response, response.status_code)


def test_error_bodies_are_json_whatever_they_quote(client):
    raw = json.dumps({"messages": TALK, "\u2028\x00\x1f\U0001f642": 1}, ensure_ascii=False).encode()
    response: httpx.Response = client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert client.fault(response, 400)["param"] == "\u2028\x00\x1f\U0001f642"
