"""The key, and the limits on bodies, headers, queue and time."""

import asyncio

import pytest

from jinfer import ConfigError

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer"},
        {"authorization": "sesame"},
        {"authorization": "Basic sesame"},
        {"authorization": "Bearer sesame2"},
        {"authorization": b"Bearer s\xe9same"},
        {"x-api-key": "sesame"},
    ],
)
def test_a_wrong_key(make_client, header):
    client = make_client(api_key="sesame")
    for response in (client.post(CHAT, BODY, headers=header), client.get("/v1/models", headers=header)):
        assert client.fault(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.engine.seen == []


def test_the_right_key(make_client):
    client = make_client(api_key="sesame")
    for scheme in ("Bearer", "bearer"):
        client.post(CHAT, BODY, headers={"authorization": f"{scheme} sesame"}).raise_for_status()
    both = [("authorization", "Bearer wrong"), ("authorization", "Bearer sesame")]
    client.fault(client.post(CHAT, BODY, headers=both), 401)


def test_several_keys(make_client):
    client = make_client(api_key=["old", "new"])
    for key in ("old", "new"):
        client.post(CHAT, BODY, headers={"authorization": f"Bearer {key}"}).raise_for_status()
    for key in ("older", "old new", "oldnew", ""):
        client.fault(client.post(CHAT, BODY, headers={"authorization": f"Bearer {key}"}), 401)


def test_what_needs_no_key(make_client):
    client = make_client(api_key="sesame")
    for path in ("/health", "/ready", "/version", "/metrics", "/"):
        assert client.get(path).status_code == 200
    for path in ("/tokenize", "/detokenize", "/v1/completions"):
        client.fault(client.post(path, {"prompt": "x"}), 401)
    for path in ("/openapi.json", "/nothing", "/v1/models", "/health/"):
        client.fault(client.get(path), 401)


def test_an_empty_key_is_not_a_key(make_client):
    with pytest.raises(ConfigError, match="api_key is empty"):
        make_client(api_key=" ")


def test_a_body_that_is_too_large(make_client):
    client = make_client(max_body_bytes=2000)
    error = client.fault(client.chat("x" * 3000), 413)
    assert error["code"] == "body_too_large"
    assert "2000" in error["message"]
    client.chat("x" * 500).raise_for_status()


def test_a_ten_megabyte_body(client):
    client.fault(client.chat("x" * 10_000_000), 413)
    client.chat().raise_for_status()


def test_a_body_without_a_length_is_counted_as_it_comes(make_client, wire):
    client = make_client(max_body_bytes=10_000)

    async def run():
        line = wire(client.app, CHAT)
        task = line.start()
        for _ in range(100):
            line.inbox.put_nowait({"type": "http.request", "body": b"x" * 1000, "more_body": True})
            await asyncio.sleep(0)
        line.inbox.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        await asyncio.wait_for(task, 10)
        assert line.status == 413
        assert b"body_too_large" in line.data
        # Read to its end and dropped, or the client would not get to see the answer.
        assert line.inbox.empty()
        assert client.state.active == 0

    asyncio.run(run())


def test_a_small_length_does_not_open_the_door(make_client, wire):
    client = make_client(max_body_bytes=10_000)

    async def run():
        line = wire(client.app, CHAT, b"y" * 20_000, headers=[(b"content-length", b"10")])
        await asyncio.wait_for(line.start(), 10)
        assert line.status == 413

    asyncio.run(run())


@pytest.mark.parametrize("length", [b"-1", b"abc", b"1e3", b""])
def test_a_length_that_is_none(client, wire, length):
    async def run():
        line = wire(client.app, CHAT, BODY, headers=[(b"content-length", length)])
        await line.start()
        assert line.status == 400

    asyncio.run(run())


def test_headers(client):
    client.fault(client.get("/health", headers={"x-long": "y" * 20_000}), 431)
    client.fault(client.get("/health", headers=[(f"x-{i}", "y") for i in range(200)]), 431)
    client.get("/health", headers={"x-long": "y" * 4000}).raise_for_status()


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue(client, engine, stream):
    engine.capacity = 0
    response = client.chat(stream=stream)
    error = client.fault(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert response.headers["retry-after"] == "7"
    engine.capacity = 1
    client.chat(stream=stream).raise_for_status()


def test_a_request_that_takes_too_long_before_its_first_token(make_client):
    client = make_client(request_timeout=0.15)
    client.engine.hold_at = 0
    response = client.chat()
    error = client.fault(response, 504)
    assert error["code"] == "request_timeout"
    assert "0.15 s" in error["message"]
    assert response.headers["x-should-retry"] == "false"  # openai's client repeats a 504 otherwise


def test_a_request_that_takes_too_long_after_it(make_client):
    client = make_client(request_timeout=0.15)
    client.engine.hold_at = 5
    client.fault(client.chat(), 504)


def test_a_stream_that_takes_too_long_before_its_first_token_says_so(make_client, events):
    client = make_client(request_timeout=0.15)
    client.engine.hold_at = 0
    response = client.chat(stream=True)
    assert response.status_code == 200  # the engine had taken the request
    (last,) = events(response.content)
    assert last["error"]["code"] == "request_timeout"


def test_a_stream_that_takes_too_long_says_so(make_client, events):
    client = make_client(request_timeout=0.5)
    client.engine.hold_at = 5
    response = client.chat(stream=True)
    assert response.status_code == 200
    *chunks, last = events(response.content)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks).startswith("Grü")
    assert last["error"]["code"] == "request_timeout"


def test_a_body_that_never_ends_times_out(make_client, wire):
    client = make_client(request_timeout=0.15)

    async def run():
        line = wire(client.app, CHAT)
        line.inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        await asyncio.wait_for(line.start(), 10)
        assert line.status == 408
        assert client.state.active == 0

    asyncio.run(run())
