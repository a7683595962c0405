"""One HTTP/1.1 connection: uvicorn's protocol over h11, with a deadline in every phase.

    HEADERS   from connecting, or from the first byte of a later request, until the request's headers are complete
    BODY      until its body is complete
    ANSWER    until its answer is complete
    LEFTOVER  the answer is complete and the body is not: the rest is read and dropped
    FLUSH     the answer is complete and the client has not taken all of it
    IDLE      between two requests
    CLOSING   an error has been sent, nothing that comes is read any more

HEADERS and IDLE are where a connection costs nobody anything when it is closed: `admission.Connections` may do so.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from h11._readers import ContentLengthReader
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.admission import Connections
from serve.protocol import APIError

MAX_HEADER_BLOCK = 32 * 1024  # bytes of request line and headers; middleware has the finer limit
READ_BYTES = 64 * 1024  # by one read. asyncio's own 256 KB would keep the event loop four times as long
MIN_BODY_RATE = 1024  # bytes/s that a body must bring, on average over the read timeout
WRITE_GRACE = 10.0  # seconds after the request timeout until an answer that is not taken is dropped
LEFTOVER_SECONDS = 10.0  # for the rest of a body whose answer has been sent
LINGER_SECONDS = 1.0  # closing at once, with input unread, would reset the connection and lose the answer
CLOSE_SECONDS = 5.0  # for the last bytes to leave after that
PEER_CHECK_SECONDS = 0.25  # how often a half-closed connection is looked at


class Phase(enum.Enum):
    HEADERS = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    LEFTOVER = enum.auto()
    FLUSH = enum.auto()
    IDLE = enum.auto()
    CLOSING = enum.auto()


@dataclass(frozen=True)
class Timeouts:
    """Seconds: for headers, and for each piece of a body; between requests; for a whole request."""

    read: float
    keep_alive: float
    request: float


class ApiProtocol(H11Protocol):
    """HTTP/1.1 whose own errors are OpenAI error bodies too, and which waits for nothing without a limit.

    One timer serves all phases. It is armed anew only when it rings or a nearer deadline comes, so that a request
    on a busy connection costs no timer at all.
    """

    def __init__(self, *, connections: Connections, timeouts: Timeouts, **settings: Any) -> None:
        super().__init__(**settings)
        self.conn = _Requests(self._on_event)
        self._crowd = connections
        self._timeouts = timeouts
        self._phase = Phase.CLOSING
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._answer_by = 0.0  # when what this request asked for has been taken, or the connection is dropped
        self._came = 0  # bytes since the body's deadline was set
        self._half_closed = False

    # The transport's side

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.max_size = READ_BYTES
        self._enter(Phase.HEADERS, self._timeouts.read)

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = Phase.CLOSING
        self._crowd.forget(self)
        self._crowd.open -= 1
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.CLOSING:
            return
        self._came += len(data)
        super().data_received(data)
        if self._phase is Phase.IDLE and self.conn.has_input:
            self._enter(Phase.HEADERS, self._timeouts.read)

    def eof_received(self) -> bool:
        """A client that has sent its request may close its sending side and still wait for the answer.

        One that has closed the connection for good looks the same until something is sent: its system answers a
        write with a reset. So an interim response goes out, which HTTP/1.1 clients skip, and the socket's error is
        looked at from time to time. Returns whether the connection stays open.
        """
        if self._phase is not Phase.ANSWER or self.transport.get_extra_info("ssl_object") is not None:
            # No whole request to answer, or nothing left but bytes that `close` sends first. And TLS as asyncio has it
            # knows no side that is closed alone.
            return False
        if not self._half_closed:
            self._half_closed = True
            if not self.cycle.response_started and self.conn.their_http_version == b"1.1":
                self.transport.write(
                    self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                )
            self._check_peer()
        return True

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._phase is Phase.FLUSH:
            # Later: the transport is in the middle of a write, where it must not be closed.
            self.loop.call_soon(self._after_flush)

    def _check_peer(self) -> None:
        if self._phase is not Phase.ANSWER or self.transport.is_closing():
            return
        sock: socket.socket = self.transport.get_extra_info("socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(PEER_CHECK_SECONDS, self._check_peer)

    # Phases

    def _enter(self, phase: Phase, seconds: float) -> None:
        self._crowd.forget(self)
        self._phase = phase
        if phase is Phase.IDLE:
            self._crowd.idle[self] = None
        elif phase is Phase.HEADERS:
            self._crowd.silent[self] = None
        self._came = 0
        self._deadline = self.loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.loop.time() < self._deadline:
            self._set_timer()
        elif self.transport.is_closing():
            self.transport.abort()  # closed, but for bytes that nobody takes
        elif self._phase is Phase.BODY:
            self._check_body()
        elif self._phase is Phase.HEADERS and self.conn.has_input:
            self._refuse(_too_slow("headers"))
        elif self._phase in (Phase.HEADERS, Phase.IDLE, Phase.CLOSING):
            self._close()
        else:
            self.transport.abort()

    def _check_body(self) -> None:
        left = self._answer_by - self.loop.time()
        # While the server does not read, the client is not to blame.
        is_ours = self.flow.read_paused or self.cycle.waiting_for_100_continue
        if left > 0 and (is_ours or self._came >= self._timeouts.read * MIN_BODY_RATE):
            self._enter(Phase.BODY, min(left, self._timeouts.read))
        else:
            self._refuse(_too_slow("body"))

    def _on_event(self, event: Any) -> None:
        """Sees each event of h11 before uvicorn does."""
        kind = type(event)
        if kind is h11.Request:
            answer_by = self.loop.time() + self._timeouts.request + WRITE_GRACE
            if self.transport.get_write_buffer_size():
                answer_by = min(answer_by, self._answer_by)  # the last answer is not taken yet
            self._answer_by = answer_by
            self._enter(Phase.BODY, min(self._timeouts.read, self._until_answered()))
        elif kind is h11.EndOfMessage:
            if self._phase is Phase.BODY:
                self._enter(Phase.ANSWER, self._until_answered())
            elif self._phase is Phase.LEFTOVER:
                self._rest()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return  # what is left goes out by the request's deadline
        if self._phase is Phase.BODY:
            self._enter(Phase.LEFTOVER, min(LEFTOVER_SECONDS, self._until_answered()))
            self.flow.resume_reading()
            return
        self._rest()
        if self._phase is Phase.IDLE:
            self._go_on()

    def _rest(self) -> None:
        """After an answer: idle, or first until the client has taken it."""
        if self.transport.get_write_buffer_size():
            self._enter(Phase.FLUSH, self._until_answered())
            self.flow.pause_reading()
            self.transport.set_write_buffer_limits(high=0)  # so that `resume_writing` means: all is sent
        else:
            self._enter(Phase.IDLE, self._timeouts.keep_alive)

    def _after_flush(self) -> None:
        if self._phase is Phase.FLUSH and not self.transport.is_closing():
            self.transport.set_write_buffer_limits()
            self._enter(Phase.IDLE, self._timeouts.keep_alive)
            self._go_on()

    def _go_on(self) -> None:
        """Reads the next request, which may be here already."""
        if self._half_closed and not self.conn.has_input:
            self._close()
            return
        self.flow.resume_reading()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
        self.handle_events()
        if self._phase is Phase.IDLE and self.conn.has_input:
            self._enter(Phase.HEADERS, self._timeouts.read)

    def _until_answered(self) -> float:
        return max(0.0, self._answer_by - self.loop.time())

    # Ends

    def evict(self) -> None:
        """Closes a connection on which nothing is going on, to make room for another."""
        self.transport.abort()

    def shutdown(self) -> None:
        if self._phase in (Phase.BODY, Phase.ANSWER):
            self.cycle.keep_alive = False
        else:
            self._close()

    def _close(self) -> None:
        self._enter(Phase.CLOSING, CLOSE_SECONDS)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        fault = sys.exc_info()[1]  # h11's error, in whose handler this is called
        status = getattr(fault, "error_status_hint", 400)
        self._refuse(APIError(status, f"not a valid HTTP request: {fault or msg}", code="invalid_http"))

    def _refuse(self, error: APIError) -> None:
        """Answers with an error and reads no further."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            # An answer is on its way, and nothing sensible can follow it.
            self._close()
            return
        body = error.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-content-type-options", b"nosniff"),
            (b"x-request-id", uuid.uuid4().hex.encode()),
        ]
        for event in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the endpoint that waits for the body gets to know
            self.cycle.message_event.set()
        self._enter(Phase.CLOSING, LINGER_SECONDS)
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the client has reset the connection
                self.transport.write_eof()

    def _unsupported_upgrade_warning(self) -> None:
        """Two lines of log for whoever sends the header Upgrade: not here. The header is ignored, as HTTP allows."""


class _Requests(h11.Connection):
    """h11 with the parts of RFC 9112 that it leaves out, and a listener for its events.

    What comes of a body whose length is known is handed on as it came. h11 would copy each piece into its buffer and out
    again, on the event loop: most of the loop's time for a large body.
    """

    def __init__(self, listener: Callable[[Any], None]) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BLOCK)
        self._listener = listener
        self._piece = b""  # of a body, for the next event

    @property
    def has_input(self) -> bool:
        """Whether bytes of a request have come that are not an event yet."""
        return len(self._receive_buffer) > 0 or bool(self._piece)

    def receive_data(self, data: bytes) -> None:
        if self.their_state is h11.SEND_BODY and not self.has_input and 0 < len(data) <= self._body_left():
            self._piece = data
        else:
            super().receive_data(data)

    def _body_left(self) -> int:
        """Bytes that a body of known length lacks; 0 if it is in chunks."""
        reader = self._reader
        return reader._remaining if isinstance(reader, ContentLengthReader) else 0

    def next_event(self) -> Any:
        if self._piece:
            piece, self._piece = self._piece, b""
            assert isinstance(self._reader, ContentLengthReader)
            self._reader._remaining -= len(piece)
            return h11.Data(data=piece)
        if self.their_state is h11.IDLE:
            self._skip_empty_lines()
        event: Any = super().next_event()
        if type(event) is h11.Request:
            event = _normal(event)
        self._listener(event)
        return event

    def _skip_empty_lines(self) -> None:
        """RFC 9112, 2.2: a server should ignore an empty line before the request line. Some send one after a body."""
        data = self._receive_buffer._data
        if data[:1] in (b"\r", b"\n"):
            self._receive_buffer.maybe_extract_at_most(len(data) - len(data.lstrip(b"\r\n")))


def _normal(request: h11.Request) -> h11.Request:
    """A request in the form that the app knows. Raises RemoteProtocolError for one whose end is ambiguous.

    RFC 9112, 3.2.2: a server must take the absolute form of a target, `http://host/path`, and its host goes before
    the one in the header. 6.1: Content-Length beside Transfer-Encoding, or Transfer-Encoding in HTTP/1.0, may be an
    attempt to smuggle a request past a proxy.
    """
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        beside = "with Content-Length" if b"content-length" in names else "in HTTP/1.0"
        raise h11.RemoteProtocolError(f"Transfer-Encoding {beside}", error_status_hint=400)
    scheme, separator, rest = request.target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return request
    path_at = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    host, path = rest[:path_at], rest[path_at:]
    if not host or b"@" in host:
        raise h11.RemoteProtocolError("the target names no host", error_status_hint=400)
    return h11.Request(
        method=request.method,
        target=path if path.startswith(b"/") else b"/" + path,
        headers=[(b"host", host), *((name, value) for name, value in request.headers if name != b"host")],
        http_version=request.http_version,
    )


def _too_slow(what: str) -> APIError:
    return APIError(408, f"the request's {what} did not arrive in time", code="request_timeout")
