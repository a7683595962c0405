"""Mutated requests: a short run against the real engine, and that the command finds what is planted."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from jinfer import AsyncEngine, EngineConfig, ServerConfig
from serve.app import create_app
from serve.lifecycle import run_server
from tests.support.engines import SMALL
from tests.support.fake_engine import FakeAsyncEngine
from tools.fuzz_server.cases import JSON, Case, make_case
from tools.fuzz_server.client import Answer
from tools.fuzz_server.endpoints import read_endpoints
from tools.fuzz_server.examples import EXAMPLES
from tools.fuzz_server.jsontext import encode
from tools.fuzz_server.report import explain_faults
from tools.fuzz_server.run import Limits, Result, fuzz
from tools.fuzz_server.verdict import judge
from tools.fuzz_server.watch import Watch

LIMITS = Limits(concurrency=8, timeout=60, stall=20)


def serving(engine: Any, use: Callable[[tuple[str, int]], Coroutine[Any, Any, Any]]) -> Any:
    """What `use` returns for the address of a server in this process; the clients' loop runs on a thread."""

    async def run() -> Any:
        ready = asyncio.Event()
        app, state = create_app(engine, ServerConfig())
        with socket.create_server(("127.0.0.1", 0)) as sock:
            running = asyncio.ensure_future(run_server(app, state, sock, ready.set))
            try:
                await asyncio.wait(
                    {asyncio.ensure_future(ready.wait()), running}, return_when="FIRST_COMPLETED"
                )
                found = await asyncio.to_thread(asyncio.run, use(sock.getsockname()))
                if isinstance(engine, AsyncEngine):
                    await engine.check_integrity()
                return found
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                await running

    return asyncio.run(run())


def test_the_server_stands():
    engine = AsyncEngine(EngineConfig(**{**SMALL, "warmup": True, "scheduling_policy": "priority"}))
    engine.start()
    try:
        result, watch = serving(engine, lambda address: fuzz(address, 7, range(300), LIMITS))
    finally:
        engine.shutdown()
    assert [(fault.case.index, fault.case.note, fault.complaint) for fault in result.faults] == []
    assert watch.complaints == []
    assert (result.requests, result.stalls, result.is_dead) == (300, [], False)
    assert result.statuses["200"] > 30


def test_a_planted_fault_is_found_and_made_short():
    class Planted(FakeAsyncEngine):
        def validate(self, ids: Any, params: Any, **options: Any) -> Any:
            if params.min_p or params.presence_penalty or params.frequency_penalty:
                raise ZeroDivisionError("planted")
            return super().validate(ids, params, **options)

        def stats(self) -> Any:
            figures = super().stats()
            figures.num_waiting, figures.kv_cache_usage = 0, 0.0
            return figures

    async def use(address: tuple[str, int]) -> tuple[Result, Watch, list[str]]:
        found, watch = await fuzz(address, 3, range(300), LIMITS)
        return found, watch, await explain_faults(address, Result(faults=found.faults[:1]), LIMITS)

    result, watch, words = serving(Planted(), use)
    assert result.faults
    assert all("internal_error" in fault.complaint for fault in result.faults)
    assert watch.canaries
    body = words[0].partition("--data-binary ")[2]
    assert re.search(r'"(min_p|presence_penalty|frequency_penalty)":', body)
    assert len(body) < 80


@pytest.fixture(scope="module")
def endpoints():
    app, state = create_app(FakeAsyncEngine(), ServerConfig())  # type: ignore[arg-type]
    state.close()
    return read_endpoints(app._app._app.openapi())  # type: ignore[attr-defined]


def test_a_request_is_the_same_bytes_whenever_it_is_made(endpoints):
    order = random.Random(1).sample(range(300), 300)
    first = {index: make_case(5, index, endpoints).wire for index in order}
    assert all(make_case(5, index, endpoints).wire == first[index] for index in range(300))
    assert first[0] != make_case(6, 0, endpoints).wire


def test_every_field_of_every_endpoint_is_mutated(endpoints):
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"} <= {
        endpoint.path for endpoint in endpoints
    }
    seen = {
        (case.path, name)
        for case in (make_case(0, index, endpoints) for index in range(1500))
        for name in case.fields or {}
    }
    for endpoint in endpoints:
        unseen = [name for name in endpoint.fields if (endpoint.path, name) not in seen]
        assert [name for name in unseen if name in EXAMPLES] == []
        assert len(unseen) < len(endpoint.fields) / 2  # a longer run has the rest, which mostly do nothing


def answer(status: int, body: bytes, kind: str = "application/json", **headers: str) -> Answer:
    return Answer(status, {"content-type": kind} | headers, body, complete=True)


ERROR = b'{"error":{"message":"m","type":"server_error","param":null,"code":"%b"}}'
CASE = Case(0, "", b"POST", "/", JSON, b"", b"")


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (answer(200, b"{}"), None),
        (answer(400, ERROR % b"x"), None),
        (answer(503, ERROR % b"queue_full", **{"retry-after": "1"}), None),
        (answer(200, b'data: {"a":1}\n\ndata: [DONE]\n\n', "text/event-stream"), None),
        (answer(200, b'{"a": NaN}'), "no JSON"),
        (answer(200, b'{"a": "\xff"}'), "no JSON"),
        (answer(500, ERROR % b"x"), "status 500"),
        (answer(503, ERROR % b"engine_dead", **{"retry-after": "1"}), "engine_dead"),
        (answer(503, ERROR % b"queue_full"), "queue_full"),
        (answer(504, ERROR % b"request_timeout"), "status 504"),
        (answer(400, b"no", "text/plain"), "not JSON"),
        (answer(422, b'{"detail": []}'), "fields"),
        (answer(400, b'{"error":{"message":"","type":"x","param":null,"code":null}}'), "without words"),
        (answer(400, b'{"error":{"message":"m","type":"x","param":["a"],"code":null}}'), "param"),
        (answer(400, ERROR % (b"x" * 50_000)), "bytes"),
        (answer(200, b'data: {"a":1}\n\n', "text/event-stream"), "a stream that ends"),
        (answer(200, b"data: {\n\ndata: [DONE]\n\n", "text/event-stream"), "no JSON object"),
        (
            answer(200, b"data: " + ERROR % b"internal_error" + b"\n\ndata: [DONE]\n\n", "text/event-stream"),
            "in the",
        ),
        (Answer(error="closed"), "no answer"),
        (Answer(200, {"content-type": "application/json"}, b"{", error="cut"), "broke off"),
    ],
)
def test_verdicts(got, words):
    complaint = judge(CASE, got)
    assert (complaint is None) if words is None else (words in str(complaint))


def test_text_that_no_json_library_writes(endpoints):
    texts = [case.body for case in (make_case(0, i, endpoints) for i in range(1500)) if case.body]
    for piece in (b"NaN", b"1" + b"0" * 400, rb"\ud800", b"[[[[[[[[", b"\xef\xbb\xbf", b"\xff"):
        assert any(piece in text for text in texts), piece
    assert encode({"a": [1.5, None, {"b": "\ud800"}]}) == r'{"a":[1.5,null,{"b":"\ud800"}]}'
