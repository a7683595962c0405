"""Clients that leave, engines that die, servers that shut down: nothing stays behind, and everybody is told."""

import asyncio
import time

import pytest

from jinfer import RequestError, RequestFailedError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
PROMPTS = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 50}


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "count"), [(CHAT, BODY, 1), (COMPLETIONS, PROMPTS, 3)])
@pytest.mark.parametrize("hold_at", [0, 4])
def test_a_client_that_leaves_frees_its_pages_at_once(
    client, engine, wire, path, body, count, stream, hold_at
):
    engine.hold_at = hold_at

    async def run():
        line = wire(client.app, path, body | {"stream": stream})
        task = line.start()
        await until(lambda: len(engine.running) == count)
        if stream and hold_at:
            await line.until(b'"r"')
        line.leave()
        await asyncio.wait_for(task, 10)
        assert engine.running == {}
        assert client.state.active == 0

    asyncio.run(run())


def test_a_client_that_leaves_while_sending(client, engine, wire):
    async def run():
        line = wire(client.app, CHAT)
        line.inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
        task = line.start()
        await asyncio.sleep(0.01)
        line.leave()
        await asyncio.wait_for(task, 10)
        assert engine.seen == []
        assert client.state.active == 0

    asyncio.run(run())


def test_the_server_stopping_a_request_frees_its_pages(client, engine, wire):
    engine.hold_at = 2

    async def run():
        task = wire(client.app, COMPLETIONS, PROMPTS | {"stream": True}).start()
        await until(lambda: len(engine.running) == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.running == {}
        assert client.state.active == 0

    asyncio.run(run())


def test_a_slow_reader_holds_no_pages(client, engine, wire, events, reply):
    async def run():
        line = wire(client.app, CHAT, BODY | {"stream": True})
        read_on = asyncio.Event()

        async def slow_send(message):
            line.sent.append(message)
            await read_on.wait()

        line.send = slow_send
        task = line.start()
        await until(lambda: engine.finished)
        await until(lambda: not engine.running)
        assert not task.done()
        read_on.set()
        await asyncio.wait_for(task, 10)
        chunks = events(line.data)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == reply
        assert len(chunks) < 6  # what gathered meanwhile went out as one piece

    asyncio.run(run())


def test_a_dying_engine_ends_whole_answers(client, engine):
    engine.fail_at = 3
    error = client.fault(client.chat(), 500)
    assert error["code"] == "engine_dead"
    assert "planted" in error["message"]
    client.fault(client.get("/health"), 503)
    client.fault(client.chat(), 503)


def test_a_dying_engine_ends_streams(client, engine, events):
    engine.fail_at = 3
    response = client.complete(["a", "b"], stream=True)
    assert response.status_code == 200
    *chunks, last = events(response.content)
    assert chunks
    assert last["error"]["code"] == "engine_dead"


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_one_request(client, engine, events, stream):
    engine.fail_request_at = 3
    response = client.chat(stream=stream)
    error = events(response.content)[-1]["error"] if stream else client.fault(response, 500)
    assert error["code"] == "request_failed"
    assert "a planted fault" in error["message"]
    engine.fail_request_at = None
    client.chat(stream=stream).raise_for_status()


def test_a_fault_in_taking_a_request(client, engine):
    engine.refusal = RequestFailedError("a planted fault")
    error = client.fault(client.chat(), 500)
    assert (error["code"], error["message"]) == ("request_failed", "the request failed: a planted fault")
    engine.refusal = None
    client.chat().raise_for_status()


def test_draining(client, engine, wire, events):
    """Streams end with [DONE], whole answers that were cut are refused, new requests too, and probes tell."""
    engine.hold_at = 4

    async def run():
        stream = wire(client.app, CHAT, BODY | {"stream": True})
        whole = wire(client.app, CHAT, BODY)
        tasks = [stream.start(), whole.start()]
        await stream.until(b'"r"')
        await until(lambda: len(engine.running) == 2)
        client.state.draining = True
        drain = asyncio.ensure_future(engine.drain(0.2))
        await asyncio.sleep(0.02)
        for path, status in (("/ready", 503), ("/health", 200), ("/metrics", 200), ("/v1/models", 200)):
            assert (await client.http.get(path)).status_code == status
        late = await client.http.post(CHAT, json=BODY)
        assert client.fault(late, 503)["code"] == "shutting_down"
        assert late.headers["retry-after"]
        await asyncio.wait_for(asyncio.gather(*tasks, drain), 10)
        assert events(stream.data)[-1]["choices"][0]["finish_reason"] == "abort"
        assert whole.status == 503
        assert b"shutting_down" in whole.data
        assert engine.running == {}
        assert client.state.active == 0

    asyncio.run(run())


def test_a_request_that_slips_in_behind_the_drain(client, engine, wire):
    """Checked before the drain began, handed to the engine after it."""

    async def run():
        line = wire(client.app, CHAT)
        task = line.start()
        await asyncio.sleep(0.01)  # waits for its body
        client.state.draining = True
        await engine.drain(0)
        line.inbox.put_nowait(
            {"type": "http.request", "body": b'{"messages": [{"role": "user", "content": "x"}]}'}
        )
        await asyncio.wait_for(task, 10)
        assert line.status == 503
        assert b"shutting_down" in line.data

    asyncio.run(run())


def test_an_abort_from_elsewhere_ends_a_whole_answer_as_what_it_is(client, engine, wire):
    engine.hold_at = 2

    async def run():
        line = wire(client.app, CHAT, BODY)
        task = line.start()
        await until(lambda: engine.running)
        for request_id in list(engine.running):
            await engine.abort(request_id)
        await asyncio.wait_for(task, 10)
        assert b'"finish_reason":"abort"' in line.data

    asyncio.run(run())


def test_many_requests_at_once(client, engine, wire, reply):
    """Streams, whole answers and leavers together; every answer is its own."""

    async def one(i):
        body = {"prompt": f"p{i}", "max_tokens": 8 + i % 30, "stream": i % 2 == 0, "echo": True}
        line = wire(client.app, COMPLETIONS, body)
        task = line.start()
        if i % 5 == 0:
            await asyncio.sleep(0.001 * (i % 7))
            line.leave()
        await asyncio.wait_for(task, 30)
        if i % 5:
            assert line.status == 200
            assert f'"p{i}'.encode() in line.data

    async def run():
        await asyncio.gather(*(one(i) for i in range(100)))
        assert engine.running == {}
        assert client.state.active == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, BODY),
        (COMPLETIONS, {"prompt": "x" * 5000}),
        (COMPLETIONS, {"prompt": ["x"]}),
        ("/tokenize", {"prompt": "x"}),
        ("/tokenize", BODY),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_tokenizing_does_not_hold_up_other_requests(client, engine, monkeypatch, path, body):
    def slow(*args, **kwargs):
        time.sleep(0.2)
        raise RequestError("slow")

    monkeypatch.setattr(engine.tokenizer, "encode", slow)
    monkeypatch.setattr(engine.tokenizer, "decode", slow)

    async def run():
        task = asyncio.ensure_future(client.http.post(path, json=body))
        await asyncio.sleep(0.02)
        begin = time.monotonic()
        assert (await client.http.get("/health")).status_code == 200
        assert time.monotonic() - begin < 0.15
        assert not task.done()
        assert client.fault(await task, 400)["message"] == "slow"

    asyncio.run(run())


def test_requests_are_logged_if_asked_for(make_client, caplog):
    caplog.set_level("INFO")
    client = make_client(disable_log_requests=False)
    client.chat("a secret")
    (record,) = [r for r in caplog.records if r.name == "serve.requests"]
    assert "chat" in record.getMessage()
    assert "stop" in record.getMessage()
    assert "secret" not in record.getMessage()
    make_client().chat()
    assert len([r for r in caplog.records if r.name == "serve.requests"]) == 1
