"""What grows with a request has a bound that is checked before work is done, and leaves the event loop free."""

import asyncio
import json
import os
import sys
import threading
import time

import pytest

from jinfer import TokenLogprobs
from serve import bounds, generation, work
from serve.bounds import check_values
from serve.jsonpieces import PIECE, Encoded, Long, parts, pieces
from serve.protocol import APIError
from tools.stall_check.cases import CASES

COMPLETIONS = "/v1/completions"
TYPE = {"content-type": "application/json"}


def counts(raw: bytes) -> str:
    try:
        check_values(raw)
    except APIError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": [' + b"[]," * 60_000 + b"[]]}", "more than 50000 objects and lists"),
        (b'{"a": ' + b'{"a":' * 60_000 + b"1" + b"}" * 60_000, "more than 50000 objects and lists"),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(110_000)) + b"}", "more than 100000 keys"),
        (b'{"a": [' + b'"b",' * 260_000 + b"1]}", "more than 250000 strings"),
        (b'{"a": [' + b"1," * 1_100_000 + b"1]}", "more than 1000000 values"),
    ],
)
def test_bodies_of_too_many_values(client, raw, words):
    assert words in counts(raw)
    response = client.post(COMPLETIONS, content=raw, headers=TYPE)
    assert client.fault(response, 400)["code"] == "body_too_complex"


@pytest.mark.parametrize(
    "text",
    [
        "[[{,:" * 100_000,
        '\\" [[[,' * 80_000,
        "\\" * 101 + "[[[" * 100_000,
        "\\" * 100 + "[[[" * 100_000,
        '"[,' * 200_000,
        '\n\\"[' * 100_000,
        "größer 😀 [" * 60_000,
    ],
)
@pytest.mark.parametrize("ascii", [True, False])
def test_text_is_no_structure(text, ascii):
    raw = json.dumps({"prompt": text, "n": 1}, ensure_ascii=ascii).encode()
    assert counts(raw) == ""
    # Behind the text the count goes on.
    more = json.dumps({"prompt": text, "n": [[]] * 60_000}, ensure_ascii=ascii).encode()
    assert "more than 50000 objects and lists" in counts(more)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    "text", ['a" [', "\\\\", '\\"', '"[\\\\"', "\\" * 7 + '"[[', '"\\' * 9, "[{,:", 'é\\"[é"\\\\\\"{']
)
def test_counts_do_not_depend_on_the_pieces(monkeypatch, text, size):
    """Quotes and backslashes have their meaning across the end of a piece."""
    raw = json.dumps({text: [text, [], {text: 1}], "b" + text: text + text}, ensure_ascii=False).encode()
    monkeypatch.setattr(bounds, "_PIECE", size)
    limits = {"MAX_CONTAINERS": 4, "MAX_KEYS": 3, "MAX_STRINGS": 5, "MAX_VALUES": 3}
    for name, value in limits.items():
        monkeypatch.setattr(bounds, name, value)
    assert counts(raw) == ""
    for name, value in limits.items():
        monkeypatch.setattr(bounds, name, value - 1)
        assert f"more than {value - 1} " in counts(raw)
        monkeypatch.setattr(bounds, name, value)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": dict.fromkeys(map(str, range(1000)))},
        {"logit_bias": dict.fromkeys(map(str, range(2000)), 1)},
        {"stop_token_ids": [1] * 1000},
        {"stop": ["x"] * 1000},
        {"temperature": [0.5] * 1000},
        {"response_format": dict.fromkeys(map(str, range(1000)))},
    ],
)
def test_fields_of_too_many_members(client, fields):
    name = list(fields)[-1]
    error = client.fault(client.complete("hi", **fields), 400)
    assert error["param"] == name
    assert "members, at most" in error["message"]


def test_too_many_fields(client):
    assert (
        "1001 fields"
        in client.fault(client.complete("hi", **dict.fromkeys(map(str, range(1000)))), 400)["message"]
    )


def test_fields_that_may_be_long_are_not_among_them(client):
    client.complete("hi", metadata=dict.fromkeys(map(str, range(1000)), "x")).raise_for_status()
    client.complete([7] * 900).raise_for_status()
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(200)]
    client.chat(tools=tools, tool_choice="none").raise_for_status()


class Ticks:
    """The longest time that the event loop did not turn."""

    async def __aenter__(self) -> "Ticks":
        self.worst, self.turns = 0.0, 0
        self._task = asyncio.ensure_future(self._run())
        await asyncio.sleep(0.01)
        return self

    async def _run(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            self.worst = max(self.worst, time.perf_counter() - before)
            self.turns += 1

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()


def test_large_bodies_and_answers_leave_the_event_loop_free(make_client, make_engine, wire):
    """CPU time of the loop's own thread, for a machine with other work makes every wait longer."""
    client = make_client(make_engine(max_model_len=600))
    bodies = [(case.path, case.make_body(4_000_000)) for case in CASES if "n=64" not in case.name]
    bodies = [(path, body) for path, body in dict(bodies).items() if len(body) > 100_000]
    asked = {"prompt": "hi", "n": 64, "max_tokens": 100, "ignore_eos": True, "logprobs": 20}
    bodies.append((COMPLETIONS, json.dumps(asked).encode()))
    client.engine.tokens_per_step = 50

    async def run():
        for path, body in bodies:
            line = wire(client.app, path, body, headers=[(b"content-length", str(len(body)).encode())])
            before = time.thread_time()
            await asyncio.wait_for(line.start(), 120)
            spent = time.thread_time() - before
            # The stand-in for the engine makes its log-probabilities on this thread.
            assert spent < (0.15 if path != COMPLETIONS else 2.0), (path, body[:60], line.status)
            assert line.status in (200, 400)

    asyncio.run(run())


def test_large_bodies_are_read_in_turns():
    """One at a time and in the order of asking, however many there are."""

    async def run():
        pace, order = work.Pace(), []

        async def read(number):
            for _ in range(3):
                await pace.turn()
                order.append(number)

        start = time.monotonic()
        await asyncio.gather(*(read(i) for i in range(5)))
        assert order == [*range(5)] * 3
        assert time.monotonic() - start >= 15 * work.PAUSE_SECONDS

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_large_bodies_are_prepared_at_a_lower_priority(client):
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async def run(large):
        return await client.state.in_thread(niceness, large=large)

    own = niceness()
    assert asyncio.run(run(large=True)) == min(19, max(own, work.LARGE_NICENESS))
    assert asyncio.run(run(large=False)) == own == niceness()


def test_sixteen_large_bodies_wait_for_room(make_client, wire, monkeypatch):
    """No more bodies are read at a time than there is room for; those that wait too long get 503."""
    client = make_client(max_body_bytes=200_000)
    body = json.dumps({"prompt": "x" * 150_000}).encode()
    size = [(b"content-length", str(len(body)).encode())]

    async def run():
        lines = [wire(client.app, COMPLETIONS, None, headers=size) for _ in range(16)]
        tasks = [line.start() for line in lines]
        await asyncio.sleep(0.05)
        # 8 x 200,000 bytes of room: ten bodies are being read, six have to wait.
        for line in lines:
            line.inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        assert {line.status for line in lines} == {400}
        monkeypatch.setattr("serve.body.ROOM_SECONDS", 0.1)
        lines = [wire(client.app, COMPLETIONS, None, headers=size) for _ in range(16)]
        tasks = [line.start() for line in lines]
        await asyncio.sleep(0.5)
        refused = [line for line in lines if line.status == 503]
        assert len(refused) == 6
        head = dict(refused[0].sent[0]["headers"])
        assert head[b"retry-after"]
        assert b"server_busy" in refused[0].data
        small = wire(client.app, COMPLETIONS, {"prompt": "small"})
        await asyncio.wait_for(small.start(), 10)
        assert small.status == 200
        nameless = wire(client.app, COMPLETIONS, body)  # of no length that is known beforehand
        await asyncio.wait_for(nameless.start(), 10)
        assert nameless.status == 503
        for line in lines:
            line.leave()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        again = wire(client.app, COMPLETIONS, body, headers=size)
        await asyncio.wait_for(again.start(), 10)
        assert again.status == 400  # too long for the model: there is room again

    asyncio.run(run())


def test_room_is_given_in_order_and_back():
    async def run():
        room = work.Room(10)
        order = []

        async def use(name, size, seconds=0.01, timeout=5.0):
            async with room.reserved(size, timeout):
                order.append(name)
                await asyncio.sleep(seconds)

        await asyncio.gather(use("a", 8), use("b", 5), use("c", 2), use("huge", 1000))
        assert order == ["a", "b", "c", "huge"]
        first = asyncio.ensure_future(use("d", 10, seconds=0.2))
        await asyncio.sleep(0)
        with pytest.raises(APIError) as caught:
            await use("e", 1, timeout=0.01)
        assert caught.value.status == 503
        waiting = asyncio.ensure_future(use("f", 1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        await use("g", 10)
        assert order[4:] == ["d", "g"]

    asyncio.run(run())


def test_the_queue_of_work_is_bounded(make_client, monkeypatch):
    monkeypatch.setattr(work, "MAX_PENDING", 0)
    client = make_client()
    response = client.chat()
    assert client.fault(response, 503)["code"] == "server_busy"
    assert response.headers["retry-after"]


def test_answers_of_too_many_log_probabilities(make_client, make_engine):
    client = make_client(make_engine(max_model_len=20_000))
    for fields in ({"max_tokens": 1000}, {"max_tokens": 10**6, "n": 3}, {"max_tokens": 19_000, "n": 64}):
        asked = {"logprobs": 20, "n": 64, "ignore_eos": True} | fields
        error = client.fault(client.complete("hi", **asked), 400)
        assert error["code"] == "answer_too_large"
        assert "at most 1000000" in error["message"]
    assert client.engine.seen == []
    echoed = client.complete("x" * 3000, echo=True, n=20, logprobs=20, max_tokens=1)
    assert client.fault(echoed, 400)["param"] == "prompt_logprobs"


def test_max_tokens_left_out_becomes_what_an_answer_holds(make_client, make_engine):
    client = make_client(make_engine(max_model_len=20_000))
    client.chat(logprobs=True, top_logprobs=20, n=64).raise_for_status()
    assert client.engine.seen[-1].params.max_tokens == 1_000_000 // (64 * 21)
    client.chat(logprobs=True, top_logprobs=20).raise_for_status()
    assert client.engine.seen[-1].params.max_tokens is None
    client.chat(n=64).raise_for_status()
    assert client.engine.seen[-1].params.max_tokens is None


def test_a_stream_that_nobody_reads_is_ended(client, engine, wire, monkeypatch):
    monkeypatch.setattr(generation, "MAX_READY", 50)
    asked = {"prompt": "hi", "stream": True, "max_tokens": 500, "ignore_eos": True}
    made, make = [], generation.Generation.__init__

    def made_and_known(self, *arguments):
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(generation.Generation, "__init__", made_and_known)

    async def run():
        line = wire(client.app, COMPLETIONS, asked)
        may_go = asyncio.Event()
        send = line.send

        async def slow(message):
            await send(message)
            if message.get("more_body"):
                await may_go.wait()

        line.send = slow
        task = line.start()
        await line.until(b"data")
        async with asyncio.timeout(10):
            while engine.running:
                await asyncio.sleep(0.01)
        assert [each._ready for each in made] == [[]], "what nobody has read is not kept"
        may_go.set()
        await asyncio.wait_for(task, 10)
        assert b"slow_reader" in line.data

    asyncio.run(run())


# Answers in pieces


def test_json_in_pieces_is_json():
    value = {
        "a": Long(range(1000)),
        "b": Long(Encoded(f'{{"x":{i}}}') for i in range(130)),
        "c": [],
        "d": {},
        "e": ({"i": i, "l": Long([i] * i)} for i in range(3)),
        "f": "ü\u2028" * 100_000,
        "g": [Encoded("null"), None, 1.5, True],
        "h": Long([]),
        "i": iter(()),
    }
    found = list(pieces(value))
    assert len(found) > 1
    assert max(map(len, found)) < 4 * PIECE
    read = json.loads(b"".join(found))
    assert read == {
        "a": list(range(1000)),
        "b": [{"x": i} for i in range(130)],
        "c": [],
        "d": {},
        "e": [{"i": i, "l": [i] * i} for i in range(3)],
        "f": "ü\u2028" * 100_000,
        "g": [None, None, 1.5, True],
        "h": [],
        "i": [],
    }
    assert "".join(parts({"f": "ü" * 100_000, "k": ["\u2028"]}, ascii=True)).isascii()


def test_a_long_answer_comes_in_chunks_and_a_short_one_with_its_length(make_client, make_engine, wire):
    client = make_client(make_engine(max_model_len=5000))

    async def run(**fields):
        line = wire(client.app, COMPLETIONS, {"prompt": "hi", "ignore_eos": True} | fields)
        await asyncio.wait_for(line.start(), 60)
        return line

    short = asyncio.run(run(max_tokens=5))
    assert len(short.sent) == 2
    assert int(dict(short.sent[0]["headers"])[b"content-length"]) == len(short.data)
    long = asyncio.run(run(max_tokens=300, n=4, logprobs=20))
    assert len(long.sent) > 3
    assert b"content-length" not in dict(long.sent[0]["headers"])
    answer = json.loads(long.data)
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [300] * 4


def test_log_probabilities_are_written_fast(client):
    """As text, token by token: a dictionary for each of them took twenty times as long."""
    from serve.logprobs import ChatLogprobs

    top = tuple((i, -1.0 - i / 7) for i in range(20))
    items = [TokenLogprobs(3, -1.25, 4, *zip(*top))] * 1000
    writer = ChatLogprobs(client.state.token_texts)
    start = time.thread_time()
    text = "".join(parts(Long(writer.entries(items))))
    assert time.thread_time() - start < 0.5
    entry = json.loads(text)[0]
    assert entry["logprob"] == -1.25
    assert [e["logprob"] for e in entry["top_logprobs"]] == [p for _, p in top]
    assert all(bytes(e["bytes"]).decode("utf-8", "replace") for e in entry["top_logprobs"])


def test_bounds_hold_what_clients_send():
    """An agent's conversation of thousands of messages with tools and calls."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2]}'}}
    turn = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "{}"}]
    raw = json.dumps(
        {"messages": turn * 5000, "tools": [{"type": "function", "function": {}}] * 500}
    ).encode()
    assert counts(raw) == ""
    assert bounds.MAX_BIASES >= 1024


# Streams in silence


def test_headers_come_before_the_first_token_and_comments_in_silence(make_client, wire):
    client = make_client(stream_keep_alive=0.05)
    client.engine.hold_at = 0

    async def run():
        line = wire(
            client.app,
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "stream": True},
        )
        task = line.start()
        await line.until(b": keep-alive\n\n: keep-alive\n\n")
        assert line.status == 200
        client.engine.released.set()
        await asyncio.wait_for(task, 10)
        assert line.data.endswith(b"data: [DONE]\n\n")
        assert all(part.startswith((b"data: ", b": keep-alive")) for part in line.data.split(b"\n\n")[:-1])

    asyncio.run(run())


def test_no_comments_when_switched_off(make_client, wire):
    client = make_client(stream_keep_alive=0.0)
    client.engine.hold_at = 0

    async def run():
        line = wire(client.app, COMPLETIONS, {"prompt": "x", "stream": True})
        task = line.start()
        await asyncio.sleep(0.1)
        assert line.status == 200
        assert line.data == b""
        client.engine.released.set()
        await asyncio.wait_for(task, 10)
        assert b"keep-alive" not in line.data

    asyncio.run(run())
