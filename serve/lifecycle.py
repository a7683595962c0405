"""Runs the app on a socket: starts, drains on SIGTERM, stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jinfer import EngineDeadError
from serve.admission import Acceptor, Connections, connection_limit
from serve.connection import ApiProtocol, Timeouts
from serve.state import State

logger = logging.getLogger("serve")

FLUSH_SECONDS = 5.0  # after the drain, for the last bytes to reach slow clients
LOOK_SECONDS = 0.2  # how often the engine is asked whether it lives
ENGINE_FAILED = 1  # exit status


class Server(uvicorn.Server):
    """uvicorn, except that a signal first drains: open streams end properly while /ready says 503."""

    def __init__(self, app: ASGIApp, state: State, tls: ssl.SSLContext | None = None) -> None:
        config = state.config
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="off",
                interface="asgi3",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_level=config.uvicorn_log_level,
                timeout_graceful_shutdown=1,
            )
        )
        self._state = state
        self._tls = tls
        self._connections = Connections(connection_limit(config.max_connections))
        self._timeouts = Timeouts(config.read_timeout, config.keep_alive_timeout, config.request_timeout)
        self._drain: asyncio.Task[None] | None = None
        self.exit_status = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own hands the sockets to asyncio's server."""
        await self.lifespan.startup()

        def make_protocol() -> ApiProtocol:
            return ApiProtocol(
                connections=self._connections,
                timeouts=self._timeouts,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        acceptors: list[Any] = [
            Acceptor(sock, self._connections, make_protocol, self._tls, self._timeouts.read)
            for sock in sockets or ()
        ]
        self.servers = acceptors
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own version raises the signal again at the end; a drained server exits with status 0."""
        loop = asyncio.get_running_loop()
        signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in signals.items():
                loop.remove_signal_handler(number)
                signal.signal(
                    number, handler
                )  # asyncio puts Python's own there, which raises KeyboardInterrupt

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
            await self.finish_answers()
        finally:
            self.stop()

    async def finish_answers(self) -> None:
        """Waits until what is being answered is answered, for a few seconds at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                while self._state.active:
                    await asyncio.sleep(0.02)


async def run_server(
    app: ASGIApp,
    state: State,
    sock: socket.socket,
    when_ready: Callable[[], None],
    tls: ssl.SSLContext | None = None,
) -> int:
    """Serves until a signal, a failed start or a dead engine; calls `when_ready` once the engine is.

    sock: listens already. tls: what to serve HTTPS with.

    Returns the exit status: 0 after a drain, ENGINE_FAILED if the engine died, so that a supervisor starts the
    process again. Raises what made the start fail, and ConfigError for more connections than the process may open
    files.
    """
    server = Server(app, state, tls)

    async def watch_engine() -> None:
        try:
            await state.engine.wait_ready()
        except Exception as error:
            server.stop(exit_status=1)
            failures.append(error)
            return
        when_ready()
        while state.engine.error is None:
            await asyncio.sleep(LOOK_SECONDS)
        # Each request gets its error, and /health says 503 meanwhile.
        logger.critical("%s: the process ends with status %d", state.engine.error, ENGINE_FAILED)
        await server.finish_answers()
        server.stop(exit_status=ENGINE_FAILED)

    failures: list[Exception] = []
    watch = asyncio.ensure_future(watch_engine())
    watch.add_done_callback(lambda task: _stop_for_fault(task, server))
    try:
        await server.serve(sockets=[sock])
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        state.close()
    if failures:
        raise failures[0]
    return server.exit_status


def _stop_for_fault(watch: asyncio.Task[None], server: Server) -> None:
    """A server whose engine nobody watches is not to go on."""
    if not watch.cancelled() and watch.exception() is not None:
        logger.critical("the watch over the engine failed", exc_info=watch.exception())
        server.stop(exit_status=1)
