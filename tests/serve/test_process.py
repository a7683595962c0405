"""The server over real sockets, with the official client and without: the fake engine makes the faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.server_process import FAKE, Process, read_until, serving

TALK: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving([*FAKE, "--api-key", "sesame", "--max-body-bytes", "100000"]) as process:
        yield process
        assert process.end() == 0
        assert process.errors == []


@pytest.fixture
def sdk(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="sesame", max_retries=0) as client:
        yield client


def test_openai_client(sdk, reply):
    assert [m.id for m in sdk.models.list()] == ["fake"]
    assert sdk.models.retrieve("fake").id == "fake"
    answer = sdk.chat.completions.create(model="fake", messages=TALK, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == reply
    assert answer.choices[0].logprobs.content[0].token == "G"
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    text = sdk.completions.create(model="fake", prompt=["a", "b"], max_tokens=4, logprobs=1, echo=True)
    assert [c.text for c in text.choices] == ["aGrü", "bGrü"]
    assert text.choices[0].logprobs.text_offset == [0, 0, 1, 2, 3, 3]


def test_openai_client_passes_over_comments(reply):
    slow = ["--stream-keep-alive", "0.05", "--engine", "step_seconds=0.12"]
    with serving([*FAKE, *slow]) as process:
        with openai.OpenAI(base_url=process.url + "/v1", api_key="none", max_retries=0) as client:
            with client.chat.completions.create(
                model="fake", messages=TALK, max_completion_tokens=6, stream=True
            ) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        body = {"messages": TALK, "max_tokens": 6, "stream": True}
        raw = httpx.post(process.url + "/v1/chat/completions", json=body).text
        assert raw.count(": keep-alive\n\n") > 5
        assert process.end() == 0
    assert reply.startswith(text)
    assert text


def test_openai_client_streams(sdk, reply):
    options = {"include_usage": True}
    with sdk.chat.completions.create(
        model="fake", messages=TALK, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == reply
    assert chunks[-1].usage.completion_tokens > 20
    with sdk.chat.completions.stream(model="fake", messages=TALK) as events:
        assert events.get_final_completion().choices[0].message.content == reply
    with sdk.completions.create(model="fake", prompt="x", stream=True, max_tokens=100) as stream:
        assert "".join(c.choices[0].text for c in stream) == reply


def test_openai_client_with_extras(sdk):
    extra = {"top_k": 3, "min_p": 0.1, "return_token_ids": True, "chat_template_kwargs": {"mood": "calm"}}
    answer = sdk.chat.completions.create(model="fake", messages=TALK, max_tokens=2, extra_body=extra)
    assert len(answer.choices[0].token_ids) == 2
    assert len(answer.prompt_token_ids) > 4


def test_openai_client_in_asyncio(server, reply):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="sesame") as client:

            async def one(i):
                stream = await client.completions.create(
                    model="fake", prompt=f"{i}: ", stream=True, echo=True, max_tokens=100
                )
                async with stream:
                    return "".join([c.choices[0].text async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(20)))

    assert asyncio.run(run()) == [f"{i}: {reply}" for i in range(20)]


def test_openai_client_raises_the_right_errors(server, sdk):
    with pytest.raises(openai.NotFoundError, match="does not exist") as error:
        sdk.chat.completions.create(model="gpt-9", messages=TALK)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        sdk.chat.completions.create(model="fake", messages=TALK, temperature=-1)
    assert bad.value.param == "temperature"
    with openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_openai_client_raises_in_the_middle_of_a_stream():
    with serving([*FAKE, "--engine", "fail_at=5"]) as process:
        with openai.OpenAI(base_url=process.url + "/v1", api_key="x", max_retries=0) as client:
            with client.chat.completions.create(model="fake", messages=TALK, stream=True) as stream:
                with pytest.raises(openai.APIError, match="planted"):
                    list(stream)
        # A supervisor is to start it again.
        assert process.leave() == 1
        assert "planted" in process.errors[-1]


def exchange(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes over a socket and reads the answer to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 10_000_000, 431),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            400,
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # a TLS greeting
    ],
)
def test_what_is_not_http(server, data, status):
    got, headers, body = exchange(server.port, data + b"\r\n\r\n")
    assert got == status
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert httpx.get(server.url + "/health").status_code == 200
    server.errors.clear()  # the HTTP layer notes them


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"y" * 30_000, 431),
        (b"GET / HTTP/1.1\r\nHost: localhost" + b"\r\nx: y" * 500, 431),
        (b"GET /" + b"y" * 30_000 + b" HTTP/1.1\r\nHost: localhost", 414),
        (b"GET /?" + b"y" * 30_000 + b" HTTP/1.1\r\nHost: localhost", 414),
    ],
)
def test_long_headers(server, data, status):
    got, headers, body = exchange(server.port, data + b"\r\nConnection: close\r\n\r\n")
    assert got == status
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_large_bodies_over_a_socket(server):
    head = {"authorization": "Bearer sesame", "content-type": "application/json"}
    whole = httpx.post(server.url + "/tokenize", content=b"x" * 10_000_000, headers=head)
    chunked = httpx.post(server.url + "/tokenize", content=iter([b"x" * 50_000] * 100), headers=head)
    for response in (whole, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    asking = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"
        b"Content-Length: 10000000\r\nExpect: 100-continue\r\n\r\n"
    )
    assert exchange(server.port, asking)[0] == 413
    stranger = httpx.post(server.url + "/tokenize", content=b"x" * 10_000_000)
    assert stranger.status_code in (401, 413)


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_ends_its_request(stream):
    with serving([*FAKE, "--engine", "hold_at=3"]) as process:
        body = json.dumps({"messages": TALK, "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", process.port), timeout=20) as sock:
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            process.until_running(1)
        process.until_running(0)
        assert process.end() == 0


def test_sigterm_drains():
    """What runs may finish within the limit, then it is cut with a proper end; new requests and probes get a 503."""
    with serving([*FAKE, "--drain-timeout", "1.5", "--engine", "hold_at=3"]) as process:
        client = httpx.Client(base_url=process.url, timeout=30)
        with (
            client,
            client.stream("POST", "/v1/chat/completions", json={"messages": TALK, "stream": True}) as answer,
        ):
            parts = answer.iter_bytes()
            data = read_until(parts, b'"r"')
            process.popen.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(process.url + "/ready").status_code == 200:
                assert time.monotonic() < deadline
            assert httpx.get(process.url + "/health").json() == {"status": "draining"}
            late = httpx.post(process.url + "/v1/chat/completions", json={"messages": TALK})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
            data += b"".join(parts)
        assert data.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"abort"' in data
        assert process.leave() == 0
        assert process.errors == []


def test_sigterm_lets_streams_finish(reply):
    with serving([*FAKE, "--drain-timeout", "30", "--engine", "step_seconds=0.02"]) as process:
        with httpx.stream(
            "POST", process.url + "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 100}
        ) as answer:
            parts = answer.iter_bytes()
            data = read_until(parts, b"G")
            process.popen.send_signal(signal.SIGTERM)
            data += b"".join(parts)
        events = [json.loads(e[6:]) for e in data.decode().split("\n\n") if e.startswith("data: {")]
        assert "".join(e["choices"][0]["text"] for e in events) == reply
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        assert process.leave() == 0


def test_a_second_signal_does_not_wait():
    with serving([*FAKE, "--drain-timeout", "60", "--engine", "hold_at=3"]) as process:
        with httpx.stream(
            "POST", process.url + "/v1/completions", json={"prompt": "x", "stream": True}
        ) as answer:
            read_until(answer.iter_bytes(), b"G")
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.popen.send_signal(signal.SIGINT)
            begin = time.monotonic()
            process.popen.wait(timeout=30)
            assert time.monotonic() - begin < 10
