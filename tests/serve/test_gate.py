"""What stands in front of the endpoints: hosts, CORS, request ids, the prefix of a proxy."""

from __future__ import annotations

import logging

import pytest

from jinfer import ConfigError, ServerConfig

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
PAGE = "https://app.example.org"


# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST",
        "127.0.0.1:8000",
        "[::1]:8000",
        "[::1]",
        "app.localhost",
        "localhost.",
    ],
)
def test_hosts_of_a_loopback_address(client, host):
    assert client.get("/version", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost", ""]
)
def test_other_hosts_on_a_loopback_address(client, host):
    for response in (
        client.get("/version", headers={"host": host}),
        client.post(CHAT, BODY, headers={"host": host}),
    ):
        assert client.fault(response, 403)["code"] == "host_not_allowed"
    assert client.engine.seen == []


def test_hosts_elsewhere(make_client):
    assert make_client(host="0.0.0.0").get("/version", headers={"host": "any.example"}).status_code == 200
    assert make_client(uds="/x").get("/version", headers={"host": "any.example"}).status_code == 200
    assert make_client(host="127.0.0.2").get("/version", headers={"host": "127.0.0.2"}).status_code == 200


def test_hosts_by_name(make_client):
    client = make_client(host="0.0.0.0", allowed_hosts=["api.example.org", "*.example.com"])
    for host, status in {
        "api.example.org": 200,
        "API.example.org:8443": 200,
        "a.b.example.com": 200,
        "example.com": 403,
        "example.org": 403,
        "localhost": 403,
    }.items():
        assert client.get("/version", headers={"host": host}).status_code == status, host
    assert make_client(allowed_hosts="*").get("/version", headers={"host": "evil"}).status_code == 200


# CORS


def ask(client, **headers):
    """A browser's question before a request."""
    asked = {"origin": PAGE, "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    return client.call("OPTIONS", CHAT, headers=asked | headers)


def test_pages_of_other_origins_are_not_let_in(client):
    assert "access-control-allow-origin" not in ask(client).headers
    assert "access-control-allow-origin" not in client.get("/version", headers={"origin": PAGE}).headers


def test_pages_of_allowed_origins(make_client):
    client = make_client(allowed_origins=[PAGE], api_key="sesame")
    answer = ask(client)  # a browser sends no key with it
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    given = {"origin": PAGE, "authorization": "Bearer sesame"}
    for response in (
        client.post(CHAT, BODY, headers=given),
        client.post(CHAT, BODY, headers={"origin": PAGE}),
    ):
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in response.headers["access-control-expose-headers"]
    stranger = ask(client, origin="https://evil.example")
    assert stranger.status_code == 400
    assert "access-control-allow-origin" not in stranger.headers


def test_cors_in_detail(make_client):
    client = make_client(
        allowed_origins="*", allowed_methods=["GET"], allowed_headers=["x-mine"], allow_credentials=True
    )
    assert ask(client).status_code == 400
    answer = ask(
        client, **{"access-control-request-method": "GET", "access-control-request-headers": "x-mine"}
    )
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-credentials"] == "true"


# Request ids


@pytest.mark.parametrize("given", ["abc-123", "a" * 128, "trace:1/2+3=@x._"])
def test_a_request_id_comes_back(client, given):
    headers = {"x-request-id": given}
    answers = [client.get("/version", headers=headers), client.post(CHAT, BODY, headers=headers)]
    answers += [
        client.post(CHAT, BODY | {"stream": True}, headers=headers),
        client.get("/nothing", headers=headers),
    ]
    for answer in answers:
        assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", 'a"b', "é"])
def test_a_request_id_that_would_spoil_the_log(client, given):
    own = client.get("/version", headers={"x-request-id": given.encode()}).headers["x-request-id"]
    assert own != given
    assert len(own) == 32


def test_every_answer_has_a_request_id(make_client):
    client = make_client(api_key="sesame")
    for answer in (
        client.get("/version"),
        client.post(CHAT, BODY),
        client.get("/", headers={"host": "evil"}),
    ):
        assert answer.headers["x-request-id"]
    key = {"authorization": "Bearer sesame"}
    answer = client.post(CHAT, BODY, headers=key)
    assert answer.headers.get_list("x-request-id") == [answer.json()["id"]]


def test_the_log_has_the_clients_id(make_client, caplog):
    client = make_client(disable_log_requests=False)
    with caplog.at_level(logging.INFO, "serve.requests"):
        answer = client.post(CHAT, BODY, headers={"x-request-id": "trace-7"})
        client.post(CHAT, BODY)
    first, second = caplog.messages
    assert first.startswith(f"{answer.json()['id']} (trace-7) chat: ")
    assert "(" not in second.partition(" chat: ")[0]


# A proxy's prefix


def test_a_prefix(make_client):
    client = make_client(root_path="/llm", api_key="sesame")
    for path in ("/health", "/llm/health", "/llm/"):
        assert client.get(path).status_code == 200
    key = {"authorization": "Bearer sesame"}
    for path in (CHAT, "/llm" + CHAT):
        client.fault(client.post(path, BODY), 401)
        assert client.post(path, BODY, headers=key).status_code == 200
    assert client.get("/openapi.json", headers=key).json()["servers"] == [{"url": "/llm"}]
    for path in ("/llmx/health", "/x/health"):
        client.fault(client.get(path), 401)


@pytest.mark.parametrize("path", ["llm", "/llm/", "/"])
def test_what_is_no_prefix(path):
    with pytest.raises(ConfigError, match="root_path"):
        ServerConfig(root_path=path)
