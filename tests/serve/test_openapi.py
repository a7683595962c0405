"""openapi.json: every reference resolves, ranges are those that act, and answers have the shapes it shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI

from jinfer.text import ChatTemplate
from serve import shapes
from serve.fields import NEUTRAL

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TALK = [{"role": "user", "content": "hi"}]
BODIES = {
    CHAT: ("ChatBody", {"messages": TALK}),
    COMPLETIONS: ("CompletionBody", {"prompt": "hi"}),
    EMBEDDINGS: ("EmbeddingBody", {"input": "hi"}),
}


@pytest.fixture
def schema(client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def resolve(schema: dict[str, Any], ref: str) -> Any:
    """What a reference points at, by its JSON pointer. KeyError if there is nothing."""
    root, *parts = ref.split("/")
    assert root == "#", ref
    found: Any = schema
    for part in parts:
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return found


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_it_is_openapi_and_every_reference_resolves(schema):
    OpenAPI.model_validate(schema)
    found = references(schema)
    assert "#/components/schemas/StreamOptions" in found
    for ref in found:
        assert resolve(schema, ref)
    assert "$defs" not in json.dumps(schema)


def test_every_route_is_described(client, schema):
    ours = {
        route.path.replace(":path}", "}") for route in client.app._app._app.routes if route.include_in_schema
    }
    assert schema["paths"].keys() == ours - {"/openapi.json"}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            responses = operation["responses"]
            assert "422" not in responses, path
            assert responses["200"]["content"], path
            assert "400" in responses, path
            for status, response in responses.items():
                if status != "200":
                    (content,) = response["content"].values()
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}
            assert (method == "post") == ("requestBody" in operation)


def test_content_types(client, schema):
    assert schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"].keys() == {
        "text/plain",
        "application/openmetrics-text",
    }
    for path in (CHAT, COMPLETIONS):
        kinds = schema["paths"][path]["post"]["responses"]["200"]["content"]
        assert kinds.keys() == {"application/json", "text/event-stream"}
        for stream in (False, True):
            kind = client.post(path, BODIES[path][1] | {"stream": stream}).headers["content-type"]
            assert kind.partition(";")[0] in kinds


def test_a_key_is_described_where_there_is_one(client, make_client, schema):
    assert "securitySchemes" not in schema["components"]
    closed = make_client(api_key="k")
    schema = closed.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    OpenAPI.model_validate(schema)
    assert schema["components"]["securitySchemes"]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            is_open = closed.call(method.upper(), path.replace("{name}", "fake"), {}).status_code != 401
            assert is_open == ("security" not in operation) == ("401" not in operation["responses"]), path


@pytest.mark.parametrize("path", BODIES)
def test_ranges_are_those_that_act(client, schema, path):
    """The ends of each range pass, and what is just outside does not."""
    name, base = BODIES[path]
    checked = 0
    for field, shape in schema["components"]["schemas"][name]["properties"].items():
        kinds = {kind.get("type") for kind in shape.get("anyOf", [])}
        if not kinds & {"integer", "number"} or field == "priority":
            continue
        step = 1 if "integer" in kinds else 1e-7
        ends = [("minimum", -step), ("maximum", step if step == 1 else 1e-3), ("exclusiveMinimum", 0)]
        extra = {"logprobs": True} if field == "top_logprobs" else {}
        extra |= {"max_tokens": 2**31 - 1} if field == "min_tokens" else {}
        for end, outside in ends:
            if end not in shape:
                continue
            checked += 1
            assert client.post(path, base | extra | {field: shape[end] + outside}).status_code == 400, (
                field,
                end,
            )
            if end != "exclusiveMinimum":
                response = client.post(path, base | extra | {field: shape[end]})
                assert response.status_code == 200, (field, end, response.text)
    assert checked > 20 or path == EMBEDDINGS


def test_fields_that_do_not_act_are_listed_with_what_passes(schema):
    for name, _ in BODIES.values():
        properties = schema["components"]["schemas"][name]["properties"]
        assert properties["use_beam_search"]["enum"] == [None, False]
        assert "user" in properties
        assert NEUTRAL.keys() <= properties.keys()


ASKED = (
    {},
    {"n": 2, "return_token_ids": True, "logprobs": 2, "prompt_logprobs": 1, "cache_salt": "mine"},
    {"stream": True},
    {"stream": True, "logprobs": 1, "return_token_ids": True, "stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_answers_have_their_shape(client, events, path, asked):
    if path == CHAT and "logprobs" in asked:
        asked = asked | {"logprobs": True, "top_logprobs": asked["logprobs"]}
    whole, chunk = {
        CHAT: (shapes.ChatAnswer, shapes.ChatChunk),
        COMPLETIONS: (shapes.CompletionAnswer, shapes.CompletionChunk),
    }[path]
    response = client.post(path, BODIES[path][1] | {"max_tokens": 5} | asked)
    if asked.get("stream"):
        for event in events(response.content):
            chunk.model_validate(event)
    else:
        answer = response.json()
        whole.model_validate(answer)
        assert answer["service_tier"] is answer["system_fingerprint"] is None
        # Shown to those who share no cached page with others.
        details = answer["usage"]["prompt_tokens_details"]
        assert details is None if "cache_salt" not in asked else details.keys() == {"cached_tokens"}


def test_other_answers_have_their_shape(client):
    for shape, response in (
        (shapes.EmbeddingAnswer, client.post(EMBEDDINGS, {"input": ["a", "b"]})),
        (shapes.EmbeddingAnswer, client.post(EMBEDDINGS, {"input": "a", "encoding_format": "base64"})),
        (shapes.ModelList, client.get("/v1/models")),
        (shapes.ModelCard, client.get("/v1/models/fake")),
        (shapes.TokenizeAnswer, client.post("/tokenize", {"prompt": "a"})),
        (shapes.TokenizeAnswer, client.post("/tokenize", {"prompt": "a", "return_token_strs": True})),
        (shapes.DetokenizeAnswer, client.post("/detokenize", {"tokens": [1]})),
        (shapes.TokenizerInfo, client.get("/tokenizer_info")),
        (shapes.Status, client.get("/health")),
        (shapes.Version, client.get("/version")),
        (shapes.ErrorAnswer, client.post(CHAT, {})),
        (shapes.ErrorAnswer, client.get("/nothing")),
    ):
        shape.model_validate(response.json())


def test_tokenizer_info(client, engine, make_client, tmp_path):
    info = client.get("/tokenizer_info").json()
    tokenizer = engine.tokenizer
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert info["vocab_size"] == tokenizer.vocab_size
    assert info["model_max_length"] == 1000
    assert info["added_tokens_decoder"][str(tokenizer.bos_id)] == {"content": "<s>", "special": True}
    # A client that renders the template itself gets the server's prompt.
    text = ChatTemplate({"default": info["chat_template"]}, tokenizer.special_tokens).render(
        TALK, add_generation_prompt=True
    )
    tokens = client.post("/tokenize", {"messages": TALK}).json()["tokens"]
    assert tokenizer.encode(text, add_special_tokens=False) == tokens
    # One that the operator brought may be private.
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    assert make_client(chat_template=str(file)).get("/tokenizer_info").json()["chat_template"] is None
    assert make_client(api_key="k").get("/tokenizer_info").status_code == 401
    engine.is_ready = False
    assert client.fault(client.get("/tokenizer_info"), 503)["code"] == "not_ready"
    engine.is_ready = True
