"""openapi.json: requests from the models that validate them, answers from their shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve import shapes
from serve.fields import HARMLESS, NEUTRAL
from serve.middleware import OPEN_PATHS
from serve.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody

REF = "#/components/schemas/{model}"
GET_FAILURES = (400, 500)
POST_FAILURES = (400, 404, 408, 413, 415, 429, 500, 503, 504)
FAILURES = {
    400: "a field is wrong, unknown, or asks for what is not served; `param` names it",
    401: "the API key is missing or wrong",
    404: "the model is not served here",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full: see Retry-After",
    500: "a fault of the server or in the request's computation",
    503: "loading, draining or failed: see Retry-After",
    504: "the request took longer than --request-timeout",
}


@dataclass(frozen=True)
class Operation:
    """What an endpoint takes and gives."""

    answer: type[BaseModel] | str  # a JSON body, or the content type of a text
    body: type[Body] | None = None
    chunk: type[BaseModel] | None = None  # of an event, where answers may be streamed
    failures: tuple[int, ...] = GET_FAILURES
    other_types: tuple[str, ...] = ()


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation(
        shapes.ChatAnswer, ChatBody, shapes.ChatChunk, failures=POST_FAILURES
    ),
    ("post", "/v1/completions"): Operation(
        shapes.CompletionAnswer, CompletionBody, shapes.CompletionChunk, failures=POST_FAILURES
    ),
    ("post", "/v1/embeddings"): Operation(shapes.EmbeddingAnswer, EmbeddingBody, failures=POST_FAILURES),
    ("post", "/tokenize"): Operation(shapes.TokenizeAnswer, TokenizeBody, failures=POST_FAILURES),
    ("post", "/detokenize"): Operation(shapes.DetokenizeAnswer, DetokenizeBody, failures=POST_FAILURES),
    ("get", "/v1/models"): Operation(shapes.ModelList),
    ("get", "/v1/models/{name}"): Operation(shapes.ModelCard, failures=(404, *GET_FAILURES)),
    ("get", "/tokenizer_info"): Operation(shapes.TokenizerInfo, failures=(503, *GET_FAILURES)),
    ("get", "/health"): Operation(shapes.Status, failures=(503, *GET_FAILURES)),
    ("get", "/ready"): Operation(shapes.Status, failures=(503, *GET_FAILURES)),
    ("get", "/version"): Operation(shapes.Version),
    ("get", "/metrics"): Operation("text/plain", other_types=("application/openmetrics-text",)),
}


def install_openapi(app: FastAPI, has_key: bool) -> None:
    """Makes the app describe its requests and answers. The schemas are made when somebody asks, not at every start.

    The endpoints read their bodies themselves (FastAPI would parse them on the event loop and answer errors in a form
    of its own), so FastAPI knows paths and their parameters alone.
    """
    make_paths: Callable[[], dict[str, Any]] = app.openapi
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(_describe(make_paths(), has_key))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(schema: dict[str, Any], has_key: bool) -> dict[str, Any]:
    models = [shapes.ErrorAnswer]
    for operation in OPERATIONS.values():
        models += [m for m in (operation.answer, operation.body, operation.chunk) if isinstance(m, type)]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    for operation in OPERATIONS.values():
        if operation.body is not None:
            _add_neutral(components["schemas"][operation.body.__name__])
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    # "{name:path}" is how the routes write a parameter that may have slashes.
    paths = {path.replace(":path}", "}"): methods for path, methods in schema["paths"].items()}
    for (method, path), operation in OPERATIONS.items():
        if path not in paths:
            continue
        described = paths[path][method]
        failures = operation.failures
        if has_key and path not in OPEN_PATHS:
            described["security"] = [{"key": []}]
            failures = (401, *failures)
        described["responses"] = _responses(operation, failures)
        if operation.body is not None:
            described["requestBody"] = {"required": True, "content": _json(operation.body)}
    return schema | {"paths": paths, "components": components}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}


def _responses(operation: Operation, failures: tuple[int, ...]) -> dict[str, Any]:
    if isinstance(operation.answer, str):
        kinds = (operation.answer, *operation.other_types)
        content = {kind: {"schema": {"type": "string"}} for kind in kinds}
    else:
        content = _json(operation.answer)
    if operation.chunk is not None:
        content["text/event-stream"] = _json(operation.chunk)["application/json"]
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    for status in sorted(failures):
        responses[str(status)] = {"description": FAILURES[status], "content": _json(shapes.ErrorAnswer)}
    return responses


def _add_neutral(schema: dict[str, Any]) -> None:
    """Adds the fields that pass without acting, each with the values that do."""
    own = schema["properties"]
    for name in sorted(HARMLESS - own.keys()):
        own[name] = {"description": "changes nothing"}
    for name in sorted(NEUTRAL.keys() - own.keys()):
        own[name] = {
            "enum": [None, *NEUTRAL[name]],
            "description": "not served: the values that ask for nothing",
        }
