"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}` for every failure."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jinfer import EngineDeadError, QueueFullError, RequestError, RequestFailedError

logger = logging.getLogger("serve")

INVALID = "invalid_request_error"
SERVER = "server_error"
CLIENT_GONE = 499  # never reaches anyone: the status of a request whose client has left
MAX_MESSAGE = 2000  # an error may quote what was given, and that can be megabytes


class APIError(Exception):
    """A failure with its HTTP status and the fields of its body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind or (SERVER if status >= 500 else INVALID)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON body. Plain ASCII, so that no quoted input can break it."""
        message = str(self)
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + " ..."
        fields = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": fields}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


class BodyTooLargeError(APIError):
    def __init__(self, limit: int) -> None:
        super().__init__(
            413,
            f"the request body is larger than {limit} bytes: send less, or start the server with a larger "
            "--max-body-bytes",
            code="body_too_large",
            # The rest of the body may still be on its way; this connection is of no more use.
            headers={"connection": "close"},
        )


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def prompt_too_long(message: str, param: str, max_model_len: int) -> APIError:
    """Clients shorten a conversation and try again when they see this code or OpenAI's words."""
    return bad_request(
        f"{message}. This model's maximum context length is {max_model_len} tokens",
        param,
        "context_length_exceeded",
    )


def unavailable(message: str, code: str, retry_after: int = 1) -> APIError:
    return APIError(503, message, code=code, headers={"retry-after": str(retry_after)})


def timed_out(seconds: float) -> APIError:
    """The request took longer than the server allows. A repeat would take as long: clients are told not to."""
    return APIError(
        504,
        f"the request took longer than {seconds:g} s and was ended: ask for fewer tokens, or start the server with "
        "a larger --request-timeout",
        code="request_timeout",
        headers={"x-should-retry": "false"},
    )


def as_api_error(error: BaseException, *, log: bool = True) -> APIError:
    """The APIError for whatever an endpoint raised; an unexpected exception is logged and says nothing of itself."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        wait = {"retry-after": str(error.retry_after)}
        return APIError(429, str(error), kind="rate_limit_error", code="queue_full", headers=wait)
    if isinstance(error, RequestError):
        return bad_request(str(error), error.param, error.code)
    if isinstance(error, RequestFailedError):
        return APIError(500, f"the request failed: {error}", code="request_failed")
    if isinstance(error, EngineDeadError):
        return APIError(500, str(error), code="engine_dead")
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return bad_request(str(error))
    if log:
        logger.error("unexpected error", exc_info=error)
    return APIError(500, "the server met an unexpected error; its log has the details", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Makes every error of the app an OpenAI error body."""

    async def on_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path
        if error.status_code == 404:
            return APIError(404, f"there is no {method} {path} here", code="not_found").response()
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{path} does not take {method}, it takes {allowed}"
            return APIError(405, message, code="method_not_allowed", headers=error.headers).response()
        return as_api_error(error).response()

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def on_unexpected(request: Request, error: Exception) -> Response:
        # Starlette raises it again behind this answer, and the HTTP server logs it.
        return as_api_error(error, log=False).response()

    handlers: dict[Any, Any] = {
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        **dict.fromkeys(
            (APIError, RequestError, RequestFailedError, EngineDeadError, RequestValidationError), on_error
        ),
        Exception: on_unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
