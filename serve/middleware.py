"""What stands in front of every endpoint. `Gate` is outside, `Access` inside, and CORS between them where it is on:
a browser asks for permission without a key, and may read the refusal of a wrong one.

Plain ASGI: the framework's own middleware base copies every event of a stream through a queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jinfer import ServerConfig
from serve.listen import is_loopback
from serve.protocol import CLIENT_GONE, APIError, BodyTooLargeError
from serve.requestlog import client_request_id
from serve.state import State

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
MAX_TARGET_BYTES = 8 * 1024  # path and query
# Open without a key: probes, the version, the page (which asks for the key), and figures without content.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics"})
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")  # what may stand in a log line
LOCAL_HOSTS = ("localhost", "*.localhost", "127.0.0.1", "::1")
# A client that sends too much reads the answer only when it has sent all; so much is read and dropped.
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 10.0


class Gate:
    """Limits on headers, the host's name, the headers of every answer, HEAD, and the count of open requests."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        self._root = state.config.root_path or ""
        self._hosts = Hosts.of(state.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, status = scope["method"], CLIENT_GONE  # the status of an answer that nobody was there to take

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if method == "HEAD":
            # Each path that can be read can be asked about: the same answer without its body.
            scope = {**scope, "method": "GET"}
        if self._root:
            scope = _without_prefix(scope, self._root)
        try:
            await self._answer(scope, receive, _without_body(noted) if method == "HEAD" else noted)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._state.metrics.count_http(method, route, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = given[0] if len(given) == 1 and REQUEST_ID.fullmatch(given[0]) else None
        client_request_id.set(request_id and request_id.decode())
        send = _with_fixed_headers(send, request_id)
        self._state.active += 1
        try:
            self._check(scope)
            await self._app(scope, receive, send)
        except APIError as error:  # errors of the app are answered inside it
            await error.response()(scope, receive, send)
        finally:
            self._state.active -= 1

    def _check(self, scope: Scope) -> None:
        headers = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise APIError(
                431,
                f"the request has {len(headers)} headers of {size} bytes, at most {MAX_HEADERS} of "
                f"{MAX_HEADER_BYTES} bytes are taken",
                code="headers_too_large",
            )
        target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if target > MAX_TARGET_BYTES:
            raise APIError(
                414, f"the URL has {target} bytes, at most {MAX_TARGET_BYTES} are taken", code="url_too_long"
            )
        self._hosts.check(headers)


def _without_prefix(scope: Scope, root: str) -> Scope:
    """A proxy that serves this server under a prefix may pass the prefix on, or not."""
    given = {name: scope[name] for name in ("path", "raw_path")}
    if given["path"].startswith(root + "/"):
        given = {name: value[len(root) :] for name, value in given.items()}
    return {**scope, **given, "root_path": root}


class Hosts:
    """The names that a request may have in its header Host.

    A page of any website can point a name of its own at 127.0.0.1, and is then, for the browser, of one origin with a
    server that listens there: it may send requests and read the answers. The header still has the page's name.
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = [name.lower() for name in names]
        self._takes_all = "*" in names
        self._exact = frozenset(names)
        self._ends = tuple(name[1:] for name in names if name.startswith("*."))

    @classmethod
    def of(cls, config: ServerConfig) -> Hosts:
        if config.allowed_hosts:
            return cls(config.allowed_hosts)
        is_local = config.uds is None and is_loopback(config.host)
        return cls((*LOCAL_HOSTS, config.host) if is_local else ("*",))

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises APIError (403) for another name. A request without the header is none of a browser's."""
        if self._takes_all:
            return
        for name, value in headers:
            if name == b"host" and not self._takes(host := value.decode("latin-1").lower()):
                raise APIError(
                    403,
                    f"this server does not answer to the host {host[:100]!r}: use localhost, or start it with "
                    "--allowed-hosts",
                    code="host_not_allowed",
                )

    def _takes(self, host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        name = name.rstrip(".")
        return name in self._exact or name.endswith(self._ends)


class Access:
    """The API key, and the limit on bodies.

    `scope["jinfer.key"]` is the digest of the key that a request has brought, b"" without one.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._limit = state.config.max_body_bytes
        self._digests = [_digest(key.encode()) for key in state.config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._let_in(scope, receive, send)
        except APIError as error:  # here and not in the gate: a page of another origin may read it
            await error.response()(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["jinfer.key"] = self._find_key(scope["headers"])
        if self._digests and not scope["jinfer.key"] and scope["path"] not in OPEN_PATHS:
            raise APIError(
                401,
                "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        body = _Body(receive, scope, self._limit)
        await body.check_announced()
        await self._app(scope, body.receive, send)

    def _find_key(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = _digest(token.strip())
        # Digests have one length, and each is compared: the time says nothing about the keys.
        found = [hmac.compare_digest(digest, each) for each in self._digests]
        return digest if scheme.lower() == b"bearer" and any(found) else b""


class _Body:
    """Counts the bytes of a request's body as they come in and stops at the limit."""

    def __init__(self, receive: Receive, scope: Scope, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._headers: Iterable[tuple[bytes, bytes]] = scope["headers"]

    async def check_announced(self) -> None:
        """Raises APIError if the body is too large by its own account, or of no account at all."""
        announced = [value for name, value in self._headers if name == b"content-length"]
        if not announced:
            return
        if len(set(announced)) > 1 or not announced[0].isdigit():
            raise APIError(400, "the header Content-Length is not a number of bytes", code="invalid_header")
        if int(announced[0][:20]) > self._limit:
            if not any(name == b"expect" for name, _ in self._headers):
                await self._discard()
            raise BodyTooLargeError(self._limit)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                if message.get("more_body"):
                    await self._discard()
                raise BodyTooLargeError(self._limit)
        return message

    async def _discard(self) -> None:
        dropped, end = 0, time.monotonic() + DISCARD_SECONDS
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while dropped < DISCARD_BYTES and time.monotonic() < end:
                    message = await self._receive()
                    dropped += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
        except TimeoutError:
            return


def _with_fixed_headers(send: Send, request_id: bytes | None) -> Send:
    """Adds what every response carries. request_id: the client's, which goes before the server's own."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            own = [value for name, value in headers if name == b"x-request-id"]
            if request_id is not None or not own:
                headers = [(name, value) for name, value in headers if name != b"x-request-id"]
                headers.append((b"x-request-id", request_id or uuid.uuid4().hex.encode()))
            message["headers"] = [*headers, (b"x-content-type-options", b"nosniff")]
        await send(message)

    return wrapped


def _without_body(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return wrapped


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
