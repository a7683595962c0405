"""Reads the JSON body of a request and has it prepared: parsed, checked, tokenized."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic_core import from_json
from starlette.requests import Request

from serve.bounds import check_fields, check_values
from serve.protocol import APIError, bad_request
from serve.state import State
from serve.work import Pace

T = TypeVar("T")

SMALL_BODY = 16 * 1024  # bytes that take less than a millisecond to parse, whatever they are
LARGE_BODY = 64 * 1024  # beyond, a body needs room, and waits behind others of its kind
PACED_BYTES = 32 * 1024  # of a large body for each turn at reading; smaller pieces take no turns from others
ROOM_SECONDS = 20.0  # how long a body waits for room


async def prepare_body(
    state: State,
    request: Request,
    deadline: float,
    prepare: Callable[[State, dict[str, Any]], T],
    is_quick: Callable[[dict[str, Any]], bool] = lambda body: False,
) -> T:
    """What `prepare` makes of the body, on a thread unless the body is small and `is_quick` says so.

    The content type is required. Without it, a page on any website could make its visitors' browsers send requests
    to a server on their own machine; a JSON content type makes the browser ask first.

    Raises:
      APIError: 415 for another content type, 400 for anything but a JSON object or one of too many values, 503 for a
        server with no room for it, and what `prepare` raises.
    """
    _check_type(request)
    async with contextlib.AsyncExitStack() as stack:

        async def reserve(size: int) -> None:
            wait = min(ROOM_SECONDS, max(0.0, deadline - time.monotonic()))
            await stack.enter_async_context(state.room.reserved(size, wait))

        chunks, size = await _read(request, deadline, reserve, state.pace, state.config.max_body_bytes)
        if size <= SMALL_BODY:
            body = _parse(b"".join(chunks))
            if is_quick(body):
                return prepare(state, body)
            return await state.in_thread(prepare, state, body)
        return await state.in_thread(_prepare_long, state, chunks, prepare, large=size > LARGE_BODY)


def _prepare_long(state: State, chunks: list[bytes], prepare: Callable[[State, dict[str, Any]], T]) -> T:
    raw = b"".join(chunks)  # here, since joining a megabyte and more gives up Python's lock
    chunks.clear()
    check_values(raw)
    return prepare(state, _parse(raw))


def _check_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        given = repr(content_type[:60]) if content_type else "missing"
        raise APIError(
            415,
            f"the Content-Type is {given}: send 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise APIError(415, "the body is compressed: send it as it is", code="unsupported_media_type")


async def _read(
    request: Request, deadline: float, reserve: Callable[[int], Awaitable[None]], pace: Pace, most: int
) -> tuple[list[bytes], int]:
    """The body as it came, and its size in bytes; room for more than LARGE_BODY is reserved first.

    Not request.body(): that would be kept for as long as the answer takes.
    """
    announced = request.headers.get("content-length", "")
    reserved = announced.isdecimal() and int(announced) > LARGE_BODY
    if reserved:
        await reserve(int(announced))
    chunks, size, unpaced = [], 0, 0
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > LARGE_BODY and not reserved:  # of a length that nobody announced
                    reserved = True
                    await reserve(most)
                unpaced += len(chunk)
                if size > LARGE_BODY and unpaced >= PACED_BYTES:
                    unpaced = 0
                    await pace.turn()
    except TimeoutError:
        raise APIError(
            408, "the body did not arrive in time", code="request_timeout", headers={"connection": "close"}
        ) from None
    return chunks, size


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        value = parse(raw)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body is valid JSON, but not an object: send {...}", code="invalid_json")
    check_fields(value)
    return value


def parse(raw: bytes) -> Any:
    """JSON from UTF-8 bytes. ValueError for anything else, NaN, numbers of thousands of digits, halves of surrogate
    pairs and nesting deeper than 200 included."""
    return from_json(raw, allow_inf_nan=False, cache_strings="keys")
