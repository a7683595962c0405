"""Sends one case over a socket of its own and reads what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from dataclasses import dataclass, field

import h11

from tools.fuzz_server.cases import Case

PAUSE_SECONDS = 0.02  # between the pieces of a request that is sent in pieces
MAX_ANSWER = 256 * 1024 * 1024


@dataclass
class Answer:
    """What a client saw. complete: the answer ended as HTTP says. left: the client did not wait for that."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    left: bool = False
    error: str | None = None
    seconds: float = 0.0


async def exchange(address: tuple[str, int], case: Case, timeout: float) -> Answer:
    """Runs one case to its end; `timeout` in seconds bounds the whole of it."""
    answer, begin = Answer(), time.monotonic()
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(*address)
            try:
                await _run(case, reader, writer, answer)
            finally:
                _close(writer, answer.left and case.leave is not None and case.leave.reset)
    except TimeoutError:
        answer.error = f"no end after {timeout:g} s"
    except OSError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - begin
    return answer


async def _run(
    case: Case, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer
) -> None:
    sending = asyncio.ensure_future(_send(case, writer))
    reading = asyncio.ensure_future(_read(case, reader, answer))
    leave = case.leave
    try:
        if leave is not None and leave.seconds is not None:
            if not leave.reads:
                reading.cancel()
            await asyncio.wait([sending], timeout=5)
            await asyncio.wait([reading], timeout=leave.seconds)
            answer.left = not answer.complete
            return
        await reading
    finally:
        for task in (sending, reading):
            task.cancel()
        await asyncio.gather(sending, reading, return_exceptions=True)


async def _send(case: Case, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # the server may answer and close before it has read everything
        at = 0
        for cut in (*case.cuts, len(case.wire)):
            writer.write(case.wire[at:cut])
            await writer.drain()
            if cut < len(case.wire):
                await asyncio.sleep(PAUSE_SECONDS)
            at = cut
        if case.half_close:
            writer.write_eof()


async def _read(case: Case, reader: asyncio.StreamReader, answer: Answer) -> None:
    parser = _parser(case.method)
    parts: list[bytes] = []
    received = 0
    try:
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                limit = case.leave.received if case.leave is not None else None
                if limit is not None and received >= limit:
                    answer.left = True
                    return
                data = await reader.read(65536)
                received += len(data)
                if received > MAX_ANSWER:
                    answer.error = f"an answer of more than {MAX_ANSWER} bytes"
                    return
                parser.receive_data(data)
                if not data and answer.status is None:
                    answer.error = "the connection was closed without an answer"
                    return
            elif isinstance(event, h11.Response):
                answer.status = event.status_code
                answer.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                parts.append(bytes(event.data))
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)) or event is h11.PAUSED:
                answer.complete = isinstance(event, h11.EndOfMessage)
                return
    except h11.RemoteProtocolError as error:
        answer.error = f"the answer is cut off or not HTTP: {error}"
    except OSError as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        answer.body = b"".join(parts)


def _parser(method: bytes) -> h11.Connection:
    """A connection that waits for the answer to a request with this method."""
    parser = h11.Connection(h11.CLIENT)
    known = method if method in (b"HEAD", b"CONNECT") else b"GET"
    parser.send(h11.Request(method=known, target=b"/", headers=[(b"host", b"x")]))
    parser.send(h11.EndOfMessage())
    return parser


def _close(writer: asyncio.StreamWriter, reset: bool) -> None:
    if reset:
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
