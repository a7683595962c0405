"""What stands in front of every endpoint: limits on headers and body, the API key, the count of open requests.

Plain ASGI: the framework's own middleware base copies every event of a stream through a queue.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol import CLIENT_GONE, APIError, BodyTooLargeError
from serve.state import State

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024
MAX_TARGET_BYTES = 8 * 1024  # path and query
# Open without a key: probes, the version, the page (which asks for the key), and figures without content.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics"})
# A client that sends too much reads the answer only when it has sent all; so much is read and dropped.
DISCARD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 10.0


class Gate:
    """Refuses what must not reach an endpoint, and counts what does."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        self._limit = state.config.max_body_bytes
        key = state.config.api_key
        self._key_digest = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE  # of an answer that nobody was there to take

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._state.metrics.count_http(scope["method"], route, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        send = _with_fixed_headers(send)
        self._state.active += 1
        try:
            self._check(scope)
            body = _Body(receive, scope, self._limit)
            await body.check_announced()
            await self._app(scope, body.receive, send)
        except APIError as error:  # from the checks here: errors of the app are answered inside it
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
        if self._key_digest is None or scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Digests have one length, so the time of the comparison says nothing about the key.
        matches = hmac.compare_digest(_digest(token.strip()), self._key_digest)
        if scheme.lower() != b"bearer" or not matches:
            raise APIError(
                401,
                "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


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


def _with_fixed_headers(send: Send) -> Send:
    """Adds what every response carries."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
        await send(message)

    return wrapped


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
