"""The endpoints around generation: models, tokenizing, probes, metrics, version, the page."""

import base64
import hashlib
import re

import pytest

from jinfer import __version__


def test_models(client, make_client):
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 1000)
    assert client.get("/v1/models/fake").json() == card
    named = make_client(served_model_name="org/name-1")
    assert named.get("/v1/models").json()["data"][0]["id"] == "org/name-1"
    assert named.get("/v1/models/org/name-1").json()["root"] == "fake"
    assert named.chat(model="org/name-1").json()["model"] == "org/name-1"
    named.fault(named.chat(model="fake"), 404)


def test_several_names(make_client):
    client = make_client(served_model_name=["first", "org/second"])
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["first", "org/second"]
    for name in ("first", "org/second"):
        assert client.chat(model=name).json()["model"] == "first"
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    assert "'first', 'org/second'" in client.fault(client.chat(model="third"), 404)["message"]


@pytest.mark.parametrize(
    ("path", "name"), [("my-model", "my-model"), ("models--org--it/snapshots/0a1b2c", "org/it")]
)
def test_a_folder_gives_its_name_and_not_where_it_lies(make_client, make_engine, tmp_path, path, name):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    client = make_client(make_engine(model=f"{folder}/"))
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["root"]) == (name, name)
    assert client.chat(model=name).json()["model"] == name
    for path in ("/health", "/metrics", "/v1/models", "/openapi.json"):
        assert str(tmp_path) not in client.get(path).text


def test_head_on_what_can_be_read(client):
    for path in ("/", "/health", "/ready", "/version", "/v1/models", "/v1/models/fake", "/openapi.json"):
        whole, head = client.get(path), client.call("HEAD", path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length"):
            assert head.headers[name] == whole.headers[name]
    assert client.call("HEAD", "/nothing").status_code == 404
    assert client.call("HEAD", "/v1/completions").status_code == 405


def test_tokenize_a_prompt(client, engine):
    answer = client.post("/tokenize", {"prompt": "hé", "model": "fake"}).json()
    ids = engine.tokenizer.encode("hé")
    assert answer == {"count": len(ids), "max_model_len": 1000, "tokens": ids, "token_strs": None}
    plain = client.post(
        "/tokenize", {"prompt": "hé", "add_special_tokens": False, "return_token_strs": True}
    ).json()
    assert plain["tokens"] == ids[1:]
    # The vocabulary's own spelling, which keeps bytes that are no text apart.
    assert plain["token_strs"] == [engine.tokenizer.id_to_token(i) for i in ids[1:]] == ["h", "Ã", "©"]
    assert client.post("/tokenize", {"prompt": "", "add_special_tokens": False}).json()["tokens"] == []


def test_tokenize_a_chat(client, engine):
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    tokens = client.post("/tokenize", talk).json()["tokens"]
    client.chat("hi")
    assert tokens == engine.seen[0].ids
    shorter = client.post("/tokenize", talk | {"add_generation_prompt": False}).json()["tokens"]
    assert shorter == tokens[: len(shorter)]
    assert len(shorter) < len(tokens)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"),
        ({"prompt": [1]}, "prompt"),
        ({"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
        ({"messages": []}, "messages"),
        ({"prompt": "a", "temperature": 1}, "temperature"),
    ],
)
def test_tokenize_refuses(client, body, param):
    assert client.fault(client.post("/tokenize", body), 400)["param"] == param


def test_detokenize(client, engine):
    ids = engine.tokenizer.encode("Grüße 🙂")
    assert client.post("/detokenize", {"tokens": ids}).json() == {"prompt": "<s>Grüße 🙂"}
    assert client.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    shorter = client.post("/detokenize", {"tokens": ids, "skip_special_tokens": True}).json()
    assert shorter == {"prompt": "Grüße 🙂"}
    for tokens in (None, "x", [1, "a"], [10**9], [-1]):
        assert client.fault(client.post("/detokenize", {"tokens": tokens}), 400)["param"] == "tokens"


def test_probes_while_the_model_loads(client, engine):
    engine.is_ready = False
    for path in ("/health", "/ready"):
        response = client.get(path)
        assert client.fault(response, 503)["code"] == "not_ready"
    response = client.chat()
    assert client.fault(response, 503)["code"] == "not_ready"
    assert int(response.headers["retry-after"]) >= 1
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
    engine.is_ready = True
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ok", "model": "fake"}
        assert client.call("HEAD", path).status_code == 200


def test_probes_when_the_engine_has_failed(client, engine):
    engine.error, engine.is_healthy, engine.is_ready = "the engine failed: boom", False, False
    for response in (client.get("/health"), client.get("/ready"), client.chat()):
        error = client.fault(response, 503)
        assert error["code"] == "engine_dead"
        assert "boom" in error["message"]


def test_probes_when_no_step_ends(make_client, engine):
    client = make_client(engine, health_timeout=30.0)
    engine.stalled_seconds = 29.0
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    engine.stalled_seconds = 95.4
    for path in ("/health", "/ready"):
        error = client.fault(client.get(path), 503)
        assert error["code"] == "engine_stalled"
        assert "no step has ended for 95 s" in error["message"]


def test_the_words_of_a_failed_engine_are_for_those_with_a_key(make_client):
    client = make_client(api_key="sesame")
    client.engine.error, client.engine.is_healthy, client.engine.is_ready = "boom in /home/me", False, False
    for path in ("/health", "/ready"):
        assert "boom" not in client.fault(client.get(path), 503)["message"]
        wrong = client.get(path, headers={"authorization": "Bearer wrong"})
        assert "boom" not in client.fault(wrong, 503)["message"]
        right = client.get(path, headers={"authorization": "Bearer sesame"})
        assert "boom" in client.fault(right, 503)["message"]


def test_version_and_schema(client):
    assert client.get("/version").json() == {"version": __version__}
    schema = client.get("/openapi.json").json()
    content = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/CompletionBody"}


def test_the_page_runs_only_its_own_script(client):
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = dict(
        part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"


def test_the_page_is_one_file_and_writes_text_only(client):
    page = client.get("/").text
    assert not re.search(r"https?://|src=|@import|url\(", page)
    # What the model says must not become markup, and the policy would stop inline styles and handlers.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|\son\w+=\"", page)


def test_every_response_is_taken_at_its_word(client):
    for path in ("/", "/health", "/v1/models", "/nothing"):
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
