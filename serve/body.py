"""Reads the JSON body of a request."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from serve.protocol import APIError, bad_request
from serve.state import State

LARGE_BODY = 64 * 1024  # bytes that take well under a millisecond to parse


async def read_body(state: State, request: Request, deadline: float) -> dict[str, Any]:
    """The body as a dict. Raises APIError: 415 for another content type, 400 for anything but a JSON object.

    The content type is required. Without it, a page on any website could make its visitors' browsers send requests
    to a server on their own machine; a JSON content type makes the browser ask first.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        given = repr(content_type[:60]) if content_type else "missing"
        raise APIError(
            415,
            f"the Content-Type is {given}: send 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity") != "identity":
        raise APIError(415, "the body is compressed: send it as it is", code="unsupported_media_type")
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            raw = await request.body()
    except TimeoutError:
        raise APIError(
            408, "the body did not arrive in time", code="request_timeout", headers={"connection": "close"}
        ) from None
    try:
        value = parse(raw) if len(raw) < LARGE_BODY else await state.in_thread(parse, raw)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body is valid JSON, but not an object: send {...}", code="invalid_json")
    return value


def parse(raw: bytes) -> Any:
    """JSON from UTF-8 bytes. ValueError for anything else, NaN, numbers of thousands of digits, halves of surrogate
    pairs and nesting deeper than 200 included."""
    return from_json(raw, allow_inf_nan=False, cache_strings="keys")
