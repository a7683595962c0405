"""The server on a real socket, in the test's own event loop: limits can be lowered, and a start costs milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any
from unittest import mock

from jinfer import ServerConfig
from serve import lifecycle, listen
from serve.app import create_app
from tests.support.fake_engine import FakeAsyncEngine

SECONDS = 20.0  # for anything that a test waits for


class Line:
    """A client's connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.transport: Any = writer.transport

    def send(self, text: str | bytes) -> None:
        self.writer.write(text if isinstance(text, bytes) else text.encode())

    def request(self, target: str, method: str = "GET", body: str = "", headers: str = "") -> None:
        """Sends a request; `headers` are whole lines."""
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n"
        self.send(f"{head}\r\n{body}")

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next whole answer: status, headers, body. Interim ones are passed over."""
        self.transport.resume_reading()
        async with asyncio.timeout(SECONDS):
            while True:
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
                status = int(head.split()[1])
                if status >= 200:
                    break
            lines = head.split("\r\n")[1:-2]
            headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return status, headers, body

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        self.transport.resume_reading()
        data = b""
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionError):
                while part := await self.reader.read(65536):
                    data += part
        return data

    async def closed_after(self) -> float:
        """Seconds until the server closes the connection."""
        start = asyncio.get_running_loop().time()
        await self.rest()
        return asyncio.get_running_loop().time() - start

    def close(self) -> None:
        self.transport.abort()


class Running:
    """A running server and its lines."""

    def __init__(
        self, server: lifecycle.Server, engine: FakeAsyncEngine, state: Any, address: Any, task: Any
    ) -> None:
        self._server, self.engine, self.state, self.address = server, engine, state, address
        self.task: asyncio.Task[int] = task
        self.lines: list[Line] = []

    async def connect(self, receive_buffer: int | None = None, **options: Any) -> Line:
        """A new connection. receive_buffer: bytes that the client's system takes; nothing is read until an
        answer is asked for."""
        if isinstance(self.address, str):
            line = Line(*await asyncio.open_unix_connection(self.address, **options))
        else:
            sock = socket.socket()
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, self.address)
            line = Line(*await asyncio.open_connection(sock=sock, limit=2**20, **options))
            if receive_buffer is not None:
                line.transport.pause_reading()
        self.lines.append(line)
        return line

    async def get(self, target: str, **options: Any) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own."""
        line = await self.connect()
        line.request(target, **options)
        try:
            return await line.answer()
        finally:
            line.close()

    @property
    def num_open(self) -> int:
        """Connections that the server holds."""
        return self._server._connections.open

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(
    engine: FakeAsyncEngine | None = None, *, send_buffer: int | None = None, **settings: Any
) -> AsyncIterator[Running]:
    """A server that listens, with these settings of ServerConfig; it is asked to stop at the end.

    send_buffer: bytes that the server's system takes of an answer that the client does not read.
    """
    engine = engine or FakeAsyncEngine()
    settings.setdefault("port", 0)
    config = ServerConfig(**settings)
    sock = listen.bind(config)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    app, state = create_app(engine, config)  # type: ignore[arg-type]
    up = asyncio.Event()
    made: list[lifecycle.Server] = []

    def make_server(*arguments: Any) -> lifecycle.Server:
        made.append(MakeServer(*arguments))
        return made[0]

    MakeServer = lifecycle.Server
    with mock.patch.object(lifecycle, "Server", make_server):
        task = asyncio.ensure_future(
            lifecycle.run_server(app, state, sock, up.set, listen.tls_context(config))
        )
        wait = asyncio.ensure_future(up.wait())
        await asyncio.wait({wait, task}, return_when=asyncio.FIRST_COMPLETED)
        wait.cancel()
    server = Running(made[0], engine, state, sock.getsockname(), task)
    try:
        yield server
    finally:
        for line in server.lines:
            line.close()
        if not task.done():
            engine.released.set()
            os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            await asyncio.wait({task})


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)
