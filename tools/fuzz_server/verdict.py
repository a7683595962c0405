"""Whether an answer is one that a server may give."""

from __future__ import annotations

import json
from typing import Any

from tools.fuzz_server.cases import Case
from tools.fuzz_server.client import Answer

MAX_ERROR = 20_000  # bytes of an error body: one may quote what was given, but not megabytes of it
FAULTS = ("engine_dead", "internal_error", "request_failed")
ERROR_FIELDS = {"message", "type", "param", "code"}


def judge(case: Case, answer: Answer) -> str | None:
    """What is wrong with an answer, or None."""
    if answer.status is None:
        return f"no answer: {answer.error}" if case.due else None
    if answer.status >= 500:
        return _server_error(case, answer)
    if not answer.complete:
        return f"the answer broke off: {answer.error}" if case.due else None
    if case.method == b"HEAD":
        return None
    if answer.status >= 400:
        return _error_body(answer)
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return _events(answer.body)
    if kind.startswith("application/json"):
        value = _json(answer.body)
        return "a 200 whose body is no JSON" if value is None else None
    return None


def _server_error(case: Case, answer: Answer) -> str | None:
    """A 503 may say that the server is busy or going, and when to come again. Everything else is a fault, but for the
    501 that HTTP asks for where a transfer encoding is not known."""
    error = _error_of(_json(answer.body))
    code = error.get("code")
    if answer.status == 501 and (code == "invalid_http" or case.method == b"HEAD"):
        return None if case.method == b"HEAD" else _error_body(answer)
    if answer.status == 503 and code and code not in FAULTS and "retry-after" in answer.headers:
        return _error_body(answer)
    return f"status {answer.status}: {str(error.get('message', answer.body[:200]))[:300]} ({code})"


def _error_body(answer: Answer) -> str | None:
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return f"an error of type {answer.headers.get('content-type')!r}, not JSON"
    if len(answer.body) > MAX_ERROR:
        return f"an error of {len(answer.body)} bytes"
    return _error_object(_json(answer.body))


def _error_object(value: Any) -> str | None:
    error = _error_of(value)
    if set(error) != ERROR_FIELDS:
        return f"an error with the fields {sorted(error)} instead of {sorted(ERROR_FIELDS)}"
    if not (isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)):
        return "an error without words"
    for name in ("param", "code"):
        if not isinstance(error[name], (str, type(None))):
            return f"an error whose {name} is {error[name]!r}"
    return None


def _events(body: bytes) -> str | None:
    """A stream ends with [DONE], and an error in it is one that a plain answer could have."""
    blocks = body.split(b"\n\n")
    if blocks[-1] or not blocks[:-1] or blocks[-2] != b"data: [DONE]":
        return f"a stream that ends with {body[-80:]!r}"
    for block in blocks[:-2]:
        if block.startswith(b":"):
            continue
        value = _json(block.removeprefix(b"data: ")) if block.startswith(b"data: ") else None
        if not isinstance(value, dict):
            return f"an event that is no JSON object: {block[:80]!r}"
        if "error" in value:
            error = _error_of(value)
            if error.get("code") in FAULTS or error.get("type") == "server_error":
                return f"an error in the stream: {str(error.get('message'))[:300]} ({error.get('code')})"
            return _error_object(value)
    return None


def _error_of(value: Any) -> dict[str, Any]:
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else {}


def _json(data: bytes) -> Any:
    """The value, or None: for what is not UTF-8, not JSON, or has NaN in it."""

    def refuse(text: str) -> Any:
        raise ValueError(text)

    try:
        return json.loads(data.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
