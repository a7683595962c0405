"""Which connections are let in: a cap, who makes room for whom, and what happens when files run out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol

from jinfer import ConfigError

logger = logging.getLogger("serve")

MAX_OPEN_FILES = 2**20  # some systems allow a billion, and then some libraries close every number up to it
SPARE_FILES = 96  # what the engine, its caches and the log may open besides
DEFAULT_CONNECTIONS = 16384
MIN_CONNECTIONS = 8
# Taken before others get their turn. What comes while the system's queue is full is delayed by seconds: its peer repeats
# a packet that was dropped.
ACCEPT_BATCH = 512
EVICT_BATCH = 32  # of these, those that take another's place: its file is free only when they have been taken
PAUSE_SECONDS = 0.5  # without a file for the next connection and without one to close
LOG_SECONDS = 10.0  # between two lines about refused connections
_BUSY_BODY = (
    b'{"error": {"message": "the server has too many connections: try again later", "type": "server_error", '
    b'"param": null, "code": "too_busy"}}'
)
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Length: %d\r\n\r\n" % len(_BUSY_BODY)
) + _BUSY_BODY


class Evictable(Protocol):
    def evict(self) -> None: ...


class Connections:
    """All open connections of a server: at most `limit`.

    Over the limit a new connection takes the place of the one that has been idle for longest between requests, then
    of the one that has been sending headers (or shaking hands) for longest. Requests in progress are never cut; where
    nothing else is left, the new connection is refused. A crowd of silent connections so keeps nobody out: whoever
    sends a request at once is quicker than the crowd is large.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0  # sockets, from accept to close
        # In the order in which they came to be so.
        self.idle: dict[Evictable, None] = {}
        self.silent: dict[Evictable, None] = {}
        self._refused = 0
        self._next_line = 0.0

    @property
    def is_full(self) -> bool:
        """At the limit, and all are at work."""
        return self.open >= self.limit and not self.idle and not self.silent

    def forget(self, connection: Evictable) -> None:
        """Takes a connection out of those that may be closed."""
        self.idle.pop(connection, None)
        self.silent.pop(connection, None)

    def make_room(self) -> bool:
        """Closes the connection that is missed least; False if all are at work."""
        for crowd in (self.idle, self.silent):
            if crowd:
                connection = next(iter(crowd))
                del crowd[connection]
                connection.evict()
                return True
        return False

    def note_refusal(self, reason: str) -> None:
        """Logs, one line in ten seconds at most: whoever is refused would else fill the log."""
        self._refused += 1
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LOG_SECONDS
            logger.warning(
                "connections refused: %d since the last such line; %d are open. The last: %s",
                self._refused,
                self.open,
                reason,
            )
            self._refused = 0


class Acceptor:
    """Accepts on a listening socket. Stands in for asyncio's server, which knows no cap, and which logs a traceback
    per waiting connection, thousands a second, while the process has no file left to accept with."""

    def __init__(
        self,
        sock: socket.socket,
        connections: Connections,
        make_protocol: Callable[[], Any],
        tls: ssl.SSLContext | None,
        handshake_seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._connections = connections
        self._make_protocol = make_protocol
        self._tls = tls
        self._handshake_seconds = handshake_seconds
        self._handshakes: set[_Handshake] = set()
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accepts no more. The socket stays open, it is its owner's."""
        self._loop.remove_reader(self._sock)
        if self._pause is not None:
            self._pause.cancel()
        for handshake in list(self._handshakes):
            handshake.evict()

    async def wait_closed(self) -> None:
        await asyncio.gather(*(h.task for h in self._handshakes), return_exceptions=True)

    def _resume(self) -> None:
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        connections = self._connections
        most = connections.limit + EVICT_BATCH
        for _ in range(ACCEPT_BATCH):
            if connections.open >= most or (connections.is_full and self._handshakes):
                return  # in a moment those that have just been taken can make room for others
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                connections.note_refusal(f"cannot accept: {error.strerror or error}")
                out_of_files = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
                if not (out_of_files and connections.make_room()):
                    # The socket stays readable: without a pause this would be called again at once.
                    self._loop.remove_reader(self._sock)
                    self._pause = self._loop.call_later(PAUSE_SECONDS, self._resume)
                return
            sock.setblocking(False)
            if connections.open >= connections.limit and not connections.make_room():
                connections.note_refusal(f"all {connections.limit} are at work, see --max-connections")
                _turn_away(sock, is_plain=self._tls is None)
                continue
            connections.open += 1
            handshake = _Handshake(self, sock)
            self._handshakes.add(handshake)
            handshake.task.add_done_callback(lambda _, done=handshake: self._handshakes.discard(done))


class _Handshake:
    """A connection from accept to the first call of its protocol: a moment, or as long as TLS takes."""

    def __init__(self, acceptor: Acceptor, sock: socket.socket) -> None:
        self._acceptor = acceptor
        self.task = asyncio.ensure_future(self._run(sock))

    def evict(self) -> None:
        self.task.cancel()

    async def _run(self, sock: socket.socket) -> None:
        acceptor, connections = self._acceptor, self._acceptor._connections
        protocol = acceptor._make_protocol()
        options: dict[str, Any] = {}
        if acceptor._tls is not None:
            options = {"ssl": acceptor._tls, "ssl_handshake_timeout": acceptor._handshake_seconds}
            connections.silent[self] = None
        try:
            await acceptor._loop.connect_accepted_socket(lambda: protocol, sock, **options)
        except OSError as error:  # a client that is none, or has gone
            logger.debug("a connection ended before its first request: %s", error)
        finally:
            connections.forget(self)
            if protocol.transport is None:
                connections.open -= 1
                sock.close()


def _turn_away(sock: socket.socket, is_plain: bool) -> None:
    with contextlib.suppress(OSError), sock:
        if is_plain:
            with contextlib.suppress(BlockingIOError):
                sock.recv(65536)  # what is unread when a socket closes makes the client lose the answer
            sock.send(BUSY)
            sock.shutdown(socket.SHUT_WR)


def raise_open_files() -> int:
    """Raises the process's limit of open files as far as it may. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MAX_OPEN_FILES if hard == unlimited else min(hard, MAX_OPEN_FILES)
    if soft != unlimited and soft < wanted:
        # macOS reports no limit and takes 10,240 at most.
        for limit in (wanted, min(wanted, 10240)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                break
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == unlimited else soft


def connection_limit(wanted: int | None) -> int:
    """How many connections may be open at once. wanted: the operator's number; None: as many as files allow, within
    `DEFAULT_CONNECTIONS`. Raises ConfigError if there are fewer files than wanted."""
    files = raise_open_files()
    fits = max(MIN_CONNECTIONS, files - _open_files() - SPARE_FILES)
    if wanted is None:
        return min(DEFAULT_CONNECTIONS, fits)
    if wanted > fits:
        raise ConfigError(
            f"max_connections is {wanted}, and this process may open {files} files, enough for {fits} connections: "
            "lower it, or raise the limit of open files (ulimit -n, LimitNOFILE)"
        )
    return wanted


def _open_files() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/dev/fd"))
    return 32
