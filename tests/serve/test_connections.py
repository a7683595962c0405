"""Connections: a deadline in every phase, a cap, and clients that close one side."""

from __future__ import annotations

import asyncio
import asyncio.selector_events
import errno
import json
import logging
import resource
import socket
import ssl
import subprocess
from typing import Any

import h11
import pytest

import serve.admission
import serve.connection
from jinfer import ConfigError, ServerConfig
from serve import listen
from serve.admission import Acceptor, Connections, connection_limit
from tests.support.fake_engine import FakeAsyncEngine
from tests.support.inprocess_server import run, running

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
HEAD = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG: dict[str, Any] = {
    "ignore_eos": True,
    "max_tokens": 100,
    "logprobs": True,
    "top_logprobs": 20,
}  # an answer of some 200 KB
SHORT: dict[str, Any] = {"read_timeout": 0.2, "keep_alive_timeout": 0.4}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(serve.connection, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(serve.connection, "LEFTOVER_SECONDS", 0.3)
    monkeypatch.setattr(serve.connection, "WRITE_GRACE", 0.3)
    monkeypatch.setattr(serve.connection, "PEER_CHECK_SECONDS", 0.02)


def chat(**fields):
    return json.dumps(BODY | fields)


async def trickle(line, piece):
    while True:
        line.send(piece)
        await asyncio.sleep(0.02)


# Deadlines


@pytest.mark.parametrize("sent", ["", "GET /ver", "GET / HTTP/1.1\r\nHost: localhost\r\nx: y\r\n"])
def test_headers_that_do_not_come(sent):
    async def test():
        async with running(**SHORT) as server:
            line = await server.connect()
            line.send(sent)
            data = await line.rest()
            # Who has begun to speak is answered, who has not is not.
            assert (b" 408 " in data) == bool(sent)
            assert (b"request_timeout" in data) == bool(sent)

    run(test())


@pytest.mark.parametrize("sent", ["", "\r\n", "G", "GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_the_next_headers_that_do_not_come(sent):
    """One byte after an answer holds nothing."""

    async def test():
        async with running(**SHORT) as server:
            line = await server.connect()
            for _ in range(2):
                line.request("/version")
                assert (await line.answer())[0] == 200
            line.send(sent)
            assert await line.closed_after() < 3

    run(test())


def test_a_trickle_of_headers_is_no_life():
    async def test():
        async with running(**SHORT) as server:
            line = await server.connect()
            line.send("GET / HTTP/1.1\r\nHost: localhost\r\nx: ")
            task = asyncio.ensure_future(trickle(line, "y"))
            assert await line.closed_after() < 3
            task.cancel()

    run(test())


@pytest.mark.parametrize("announced", ["Content-Length: 1000\r\n", "Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("trickles", [False, True])
def test_a_body_that_does_not_come(announced, trickles):
    async def test():
        async with running(**SHORT) as server:
            line = await server.connect()
            line.send(HEAD + announced + "\r\n")
            piece = "1\r\n{\r\n" if "chunked" in announced else "{"
            task = asyncio.ensure_future(trickle(line, piece if trickles else ""))
            assert b" 408 " in await line.rest()
            task.cancel()
            await server.until(lambda: server.state.active == 0)

    run(test())


def test_a_body_that_comes_slowly_but_comes(monkeypatch):
    monkeypatch.setattr(serve.connection, "MIN_BODY_RATE", 20)

    async def test():
        async with running(**SHORT) as server:
            body = json.dumps({"prompt": "x" * 200})
            line = await server.connect()
            line.send(HEAD + f"Content-Length: {len(body)}\r\n\r\n")
            for piece in body:
                line.send(piece)
                await asyncio.sleep(0.003)
            assert (await line.answer())[0] == 200

    run(test())


def test_a_body_whose_answer_is_sent_already():
    """The rest of the body may come, for a while, and then the connection goes on."""

    async def test():
        async with running(api_key="sesame", read_timeout=5.0) as server:
            line = await server.connect()
            for ends in (True, False):
                line.send(HEAD + "Content-Length: 10\r\n\r\n12345")
                assert (await line.answer())[0] == 401
                if ends:
                    line.send("67890")
            assert await line.closed_after() < 3

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_nobody_takes(stream):
    async def test():
        async with running(request_timeout=1.0, send_buffer=4096) as server:
            line = await server.connect(receive_buffer=4096)
            line.request(CHAT, "POST", chat(stream=stream, **LONG))
            await server.until(lambda: server.state.active == 1)
            begin = asyncio.get_running_loop().time()
            await server.until(lambda: server.state.active == 0 and server.num_open == 0)
            assert asyncio.get_running_loop().time() - begin > 0.5

    run(test())


def test_an_answer_that_is_taken_late_is_whole():
    async def test():
        async with running(keep_alive_timeout=0.2, request_timeout=10.0, send_buffer=4096) as server:
            line = await server.connect(receive_buffer=4096)
            line.request(CHAT, "POST", chat(**LONG))
            line.request("/version")
            await server.until(lambda: server.state.active == 1)
            await server.until(lambda: server.state.active == 0)
            await asyncio.sleep(0.4)  # longer than idle connections live
            status, _, body = await line.answer()
            assert status == 200
            assert json.loads(body)["usage"]["completion_tokens"] == 100
            assert (await line.answer())[0] == 200
            assert await line.closed_after() < 3

    run(test())


# The cap


def test_idle_connections_make_room_the_oldest_first():
    async def test():
        async with running(max_connections=8) as server:
            lines = [await server.connect() for _ in range(8)]
            for line in lines:
                line.request("/version")
                assert (await line.answer())[0] == 200
            lines[0].request("/version")  # now the second is the oldest
            await lines[0].answer()
            late = await server.connect()
            late.request("/version")
            assert (await late.answer())[0] == 200
            assert await lines[1].closed_after() < 3
            for line in (lines[0], lines[2]):
                line.request("/version")
                assert (await line.answer())[0] == 200

    run(test())


def test_half_open_connections_keep_nobody_out():
    async def test():
        async with running(max_connections=8) as server:
            for _ in range(40):
                (await server.connect()).send("GET / HT")
            for _ in range(5):
                assert (await server.get("/version"))[0] == 200
            assert server.num_open <= 8

    run(test())


def test_work_in_progress_is_not_cut(caplog):
    async def test():
        async with running(max_connections=8) as server:
            server.engine.hold_at = 0
            busy = [await server.connect() for _ in range(8)]
            for line in busy:
                line.request(CHAT, "POST", chat())
            await server.until(lambda: len(server.engine.running) == 8)
            with caplog.at_level(logging.WARNING, "serve"):
                for _ in range(20):
                    status, headers, body = await server.get("/version")
                    assert (status, headers["retry-after"]) == (503, "1")
                    assert json.loads(body)["error"]["code"] == "too_busy"
            assert len(caplog.records) == 1
            server.engine.released.set()
            for line in busy:
                assert (await line.answer())[0] == 200
            assert (await server.get("/version"))[0] == 200

    run(test())


class NoFiles:
    """A listening socket of a process that has no file left."""

    def __init__(self, sock):
        self.sock, self.tries = sock, 0

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def accept(self):
        self.tries += 1
        raise OSError(24, "Too many open files")


def test_accepting_without_files_neither_spins_nor_fills_the_log(caplog):
    async def test():
        with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_connection(sock.getsockname()):
            listener = NoFiles(sock)
            acceptor = Acceptor(listener, Connections(100), lambda: None, None, 1.0)  # type: ignore[arg-type]
            with caplog.at_level(logging.WARNING, "serve"):
                await asyncio.sleep(0.7)
            acceptor.close()
            assert 1 <= listener.tries <= 3
        assert len(caplog.records) == 1
        assert "Too many open files" in caplog.text

    run(test())


def test_the_default_cap_follows_the_limit_of_files(monkeypatch):
    limits = [100, 160]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.__setitem__(0, pair[0]))
    monkeypatch.setattr(serve.admission, "_open_files", lambda: 14)
    assert connection_limit(None) == 50
    assert limits == [160, 160]
    assert connection_limit(20) == 20
    with pytest.raises(ConfigError, match="max_connections is 51"):
        connection_limit(51)
    limits[:] = [1024, resource.RLIM_INFINITY]
    assert connection_limit(None) == 16384


# Clients that close their sending side


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_sending_side_is_answered(version, stream, reply):
    async def test():
        async with running() as server:
            server.engine.step_seconds = 0.005
            line = await server.connect()
            body = chat(stream=stream)
            line.send(
                f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            )
            line.writer.write_eof()
            data = await line.rest()
            assert data.endswith(
                b"data: [DONE]\n\n" if stream and version == "1.0" else b"\r\n\r\n" if stream else b"}"
            )
            assert b"finish_reason" in data

    run(test())


def test_two_requests_and_then_a_closed_side():
    async def test():
        async with running() as server:
            line = await server.connect()
            server.engine.step_seconds = 0.005
            line.request(CHAT, "POST", chat())
            line.request("/version")
            line.writer.write_eof()
            assert (await line.answer())[0] == 200
            assert (await line.answer())[0] == 200
            assert await line.rest() == b""

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_ends_its_request(stream):
    """It has closed in good order, so that its system sends no more than a half-closed client's does."""

    async def test():
        async with running() as server:
            if stream:
                server.engine.step_seconds = 0.02
                server.engine.max_model_len = 10**6
            else:
                server.engine.hold_at = 3
            line = await server.connect()
            line.request(CHAT, "POST", chat(stream=stream, ignore_eos=True, max_tokens=10000))
            await server.until(lambda: len(server.engine.running) == 1)
            line.writer.write_eof()  # sent before the rest is closed
            line.writer.close()
            await server.until(lambda: not server.engine.running)

    run(test())


@pytest.mark.parametrize("sent", [HEAD, HEAD + "Content-Length: 10\r\n\r\n123"])
def test_a_side_closed_in_the_middle_of_a_request_ends_it(sent):
    async def test():
        async with running() as server:
            line = await server.connect()
            line.send(sent)
            line.writer.write_eof()
            assert await line.rest() == b""
            await server.until(lambda: server.state.active == 0)

    run(test())


def test_an_error_for_a_connection_that_is_reset_meanwhile(monkeypatch):
    logged = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda *words, **_: logged.append(words))

    def shut_down(self):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    async def test():
        async with running() as server:
            line = await server.connect()
            with monkeypatch.context() as patch:
                patch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", shut_down)
                line.send("GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\nnonsense\r\n\r\n")
                assert b" 400 " in await line.rest()

    run(test())
    assert logged == []


# The engine's end is the process's


def test_a_fault_in_the_watch_over_the_engine_ends_the_server(caplog):
    class Odd(FakeAsyncEngine):
        @property
        def error(self):
            raise ZeroDivisionError("planted")

        @error.setter
        def error(self, value):
            pass

    async def test():
        async with running(Odd()) as server:
            assert await asyncio.wait_for(server.task, 20) == 1

    run(test())
    assert "planted" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_ends_the_server(stream):
    async def test():
        async with running() as server:
            server.engine.fail_at = 3
            line = await server.connect()
            line.request(CHAT, "POST", chat(stream=stream))
            if stream:
                data = await line.reader.readuntil(b"[DONE]")
                assert b"engine_dead" in data
            else:
                assert (await line.answer())[0] == 500
            assert (await server.get("/health"))[0] == 503
            assert await asyncio.wait_for(server.task, 20) == 1

    run(test())


# Forms of requests


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/version", 200),
        ("HTTP://localhost:8000/version?x=1", 200),
        ("https://127.0.0.1/version", 200),
        ("http://localhost", 200),
        ("http://localhost?x", 200),
        ("http://localhost/nothing", 404),
        ("http://evil.example/version", 403),  # goes before the header Host
        ("http:///version", 400),
        ("http://me@localhost/version", 400),
        ("ftp://localhost/version", 404),
    ],
)
def test_the_absolute_form(target, status):
    async def test():
        async with running() as server:
            assert (await server.get(target))[0] == status

    run(test())


@pytest.mark.parametrize("size", [1, 7, 100, 1000, 10_000])
def test_bodies_come_whole_however_they_are_cut(size):
    """What is handed past h11 adds up, and the next request behind it is found."""

    def request(body, fields):
        return f"POST /x HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode() + body

    bodies = [bytes(range(256)) * 9, b"", b"end"]
    sent = b"".join(request(body, f"Content-Length: {len(body)}\r\n") for body in bodies)
    sent += request(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\n")
    conn = serve.connection._Requests(lambda event: None)
    found, body = [], b""
    for start in range(0, len(sent), size):
        conn.receive_data(sent[start : start + size])
        while (event := conn.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                found.append(body)
                body = b""
                conn.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                conn.send(h11.EndOfMessage())
                conn.start_next_cycle()
    assert found == [*bodies, b"abcde"]


def test_a_body_is_handed_on_as_it_came():
    conn = serve.connection._Requests(lambda event: None)
    conn.receive_data(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
    assert isinstance(conn.next_event(), h11.Request)
    for _ in range(2):
        assert conn.next_event() is h11.NEED_DATA
        piece = bytes(50_000)
        conn.receive_data(piece)
        assert conn.next_event().data is piece
    assert isinstance(conn.next_event(), h11.EndOfMessage)


def test_empty_lines_before_a_request():
    async def test():
        async with running() as server:
            line = await server.connect()
            whole = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
            for data in (b"\r\n" + whole, b"\r\n\r\n\n" + whole, whole + b"\r\n" + whole):
                line.send(data)
                for _ in range(data.count(b"GET")):
                    assert (await line.answer())[0] == 200
            for piece in (b"\r", b"\n", whole[:10], whole[10:]):
                line.send(piece)
                await asyncio.sleep(0.01)
            assert (await line.answer())[0] == 200

    run(test())


def test_empty_lines_are_no_life():
    async def test():
        async with running(**SHORT) as server:
            line = await server.connect()
            line.request("/version")
            await line.answer()
            task = asyncio.ensure_future(trickle(line, "\r\n"))
            assert await line.closed_after() < 3
            task.cancel()

    run(test())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("lengths", ["Content-Length: 5\r\n", ""])
def test_a_body_whose_end_is_ambiguous(version, lengths):
    async def test():
        async with running(**SHORT) as server:
            line = await server.connect()
            head = HEAD.replace("1.1", version) + lengths + "Transfer-Encoding: chunked\r\n\r\n"
            line.send(head + "2\r\n{}\r\n0\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            data = await line.rest()
            if version == "1.1" and not lengths:
                assert data.count(b"HTTP/1.1 ") == 2
            else:
                assert data.startswith(b"HTTP/1.1 400 ")
                assert data.count(b"HTTP/1.1 ") == 1  # and nothing after it is taken for a request

    run(test())


@pytest.mark.parametrize(("encoding", "status"), [("Identity", 200), ("IDENTITY ", 200), ("gzip", 415)])
def test_content_encoding(encoding, status):
    async def test():
        async with running() as server:
            line = await server.connect()
            line.request("/tokenize", "POST", '{"prompt": "x"}', f"Content-Encoding: {encoding}\r\n")
            assert (await line.answer())[0] == status

    run(test())


def test_errors_of_the_protocol_have_the_headers_of_the_rest():
    async def test():
        async with running() as server:
            line = await server.connect()
            line.send("nonsense\r\n\r\n")
            _, headers, _ = await line.answer()
            assert headers["x-content-type-options"] == "nosniff"
            assert len(headers["x-request-id"]) == 32

    run(test())


# Unix sockets and TLS


def test_a_unix_socket(tmp_path):
    async def test():
        path = str(tmp_path / "s")
        for _ in range(2):  # the second finds what the first has left
            async with running(uds=path, api_key="sesame") as server:
                status, _, body = await server.get("/version")
                assert (status, b"version" in body) == (200, True)
                with pytest.raises(ConfigError, match="in use"):
                    listen.bind(ServerConfig(uds=path))
        (tmp_path / "file").write_text("precious")
        with pytest.raises(ConfigError, match="cannot listen"):
            listen.bind(ServerConfig(uds=str(tmp_path / "file")))
        assert (tmp_path / "file").read_text() == "precious"
        with pytest.raises(ConfigError, match="too long"):
            listen.bind(ServerConfig(uds=str(tmp_path / ("x" * 200))))

    run(test())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    try:
        subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return tuple(map(str, files))


def test_https(certificate, reply):
    cert, key = certificate

    async def test():
        async with running(
            ssl_certfile=cert, ssl_keyfile=key, read_timeout=0.3, keep_alive_timeout=0.3
        ) as server:
            trust = {"ssl": ssl.create_default_context(cafile=cert), "server_hostname": "localhost"}
            line = await server.connect(**trust)
            line.request(CHAT, "POST", chat())
            status, _, body = await line.answer()
            assert status == 200
            assert json.loads(body)["choices"][0]["message"]["content"] == reply
            assert await line.closed_after() < 3
            # Who does not shake hands is closed too, and who speaks another language.
            silent = await server.connect()
            assert await silent.closed_after() < 3
            plain = await server.connect()
            plain.request("/version")
            await plain.rest()
            await server.until(lambda: server.num_open == 0)

    run(test())


def test_a_client_that_leaves_over_https_ends_its_request(certificate, caplog):
    cert, key = certificate

    async def test():
        async with running(ssl_certfile=cert, ssl_keyfile=key) as server:
            server.engine.hold_at = 3
            line = await server.connect(
                ssl=ssl.create_default_context(cafile=cert), server_hostname="localhost"
            )
            line.request(CHAT, "POST", chat(stream=True, ignore_eos=True, max_tokens=10000))
            await server.until(lambda: len(server.engine.running) == 1)
            line.writer.close()
            await server.until(lambda: not server.engine.running)
            await server.until(lambda: server.num_open == 0)

    run(test())
    assert [r for r in caplog.records if r.name == "asyncio" and r.levelno >= logging.WARNING] == []


def test_handshakes_make_room(certificate):
    cert, key = certificate

    async def test():
        async with running(ssl_certfile=cert, ssl_keyfile=key, max_connections=8) as server:
            for _ in range(20):
                await server.connect()
            line = await server.connect(
                ssl=ssl.create_default_context(cafile=cert), server_hostname="localhost"
            )
            line.request("/version")
            assert (await line.answer())[0] == 200
            assert server.num_open <= 8

    run(test())


def test_wrong_certificates(certificate, tmp_path):
    cert, key = certificate
    with pytest.raises(ConfigError, match="cannot serve HTTPS"):
        listen.tls_context(ServerConfig(ssl_certfile=key, ssl_keyfile=key))
    with pytest.raises(ConfigError, match="ssl_certfile is not"):
        ServerConfig(ssl_keyfile=key)
    locked = str(tmp_path / "locked.pem")
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:secret", "-out", locked],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="encrypted"):
        listen.tls_context(ServerConfig(ssl_certfile=cert, ssl_keyfile=locked))
