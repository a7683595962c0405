"""Runs the app on a socket: starts, drains on SIGTERM, stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from jinfer import EngineDeadError
from serve.protocol import APIError
from serve.state import State

MAX_HEADER_BLOCK = 32 * 1024  # bytes of request line and headers; middleware has the finer limit
LINGER_SECONDS = 1.0  # closing at once, with input unread, would reset the connection and lose the answer
HEADER_SECONDS = 30.0  # a connection that has not sent its first request's headers by then is closed
FLUSH_SECONDS = 5.0  # after the drain, for the last bytes to reach slow clients


class ApiProtocol(H11Protocol):
    """HTTP/1.1 whose own errors are OpenAI error bodies too, and which does not wait for headers for ever."""

    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # An answer is on its way, and nothing sensible can follow it.
            self.transport.close()
            return
        fault = sys.exc_info()[1]  # h11's error, in whose handler this is called
        status = getattr(fault, "error_status_hint", 400)
        error = APIError(status, f"not a valid HTTP request: {fault or msg}", code="invalid_http")
        body = error.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn, except that a signal first drains: open streams end properly while /ready says 503."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        config = state.config
        super().__init__(
            uvicorn.Config(
                app,
                http=ApiProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_level=config.uvicorn_log_level,
                h11_max_incomplete_event_size=MAX_HEADER_BLOCK,
                timeout_graceful_shutdown=1,
            )
        )
        self._state = state
        self._drain: asyncio.Task[None] | None = None
        self.exit_status = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own version raises the signal again at the end; a drained server exits with status 0."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_and_exit())
        else:  # a second signal: somebody is in a hurry
            self.stop()
            self.force_exit = True

    def stop(self, exit_status: int = 0) -> None:
        """Makes `serve` return soon."""
        self.exit_status = self.exit_status or exit_status
        self.should_exit = True

    async def _drain_and_exit(self) -> None:
        state = self._state
        state.draining = True
        try:
            if state.engine.is_ready:
                with contextlib.suppress(EngineDeadError):
                    await state.engine.drain(state.config.drain_timeout)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_SECONDS):
                    while state.active:
                        await asyncio.sleep(0.02)
        finally:
            self.stop()


async def run_server(app: ASGIApp, state: State, sock: socket.socket, when_ready: Callable[[], None]) -> int:
    """Serves until a signal or a failed start; calls `when_ready` once the engine is. Returns the exit status."""
    server = Server(app, state)

    async def watch_start() -> None:
        try:
            await state.engine.wait_ready()
        except Exception as error:
            server.stop(exit_status=1)
            failures.append(error)
        else:
            when_ready()

    failures: list[Exception] = []
    watch = asyncio.ensure_future(watch_start())
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        state.close()
    if failures:
        raise failures[0]
    return server.exit_status
