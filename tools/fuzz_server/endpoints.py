"""What a server takes, as its openapi.json says: endpoints with JSON bodies, and the JSON types of every field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


@dataclass(frozen=True)
class Endpoint:
    """One path that takes a JSON body. fields: name -> JSON types that its schema allows."""

    path: str
    fields: Mapping[str, frozenset[str]]


def read_endpoints(document: Mapping[str, Any]) -> list[Endpoint]:
    """Endpoints of an openapi.json, sorted by path. Raises ValueError if none of them has a body."""
    found = []
    for path, methods in sorted(document.get("paths", {}).items()):
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema")
        if schema is not None:
            whole = _resolved(schema, document, schema)
            properties = whole.get("properties", {})
            fields = {name: _types(each, document, schema) for name, each in sorted(properties.items())}
            found.append(Endpoint(path, fields))
    if not found:
        raise ValueError(
            "the server's openapi.json names no endpoint with a JSON body: is this jinfer's server?"
        )
    return found


def _types(schema: Any, *roots: Mapping[str, Any]) -> frozenset[str]:
    schema = _resolved(schema, *roots)
    if "anyOf" in schema or "oneOf" in schema:
        parts = schema.get("anyOf") or schema["oneOf"]
        return frozenset().union(*(_types(part, *roots) for part in parts))
    given = schema.get("type", TYPES)
    return frozenset([given] if isinstance(given, str) else given)


def _resolved(schema: Any, *roots: Mapping[str, Any]) -> Any:
    """The schema that a $ref points to, looked for in each root: the document, or the schema that it stands in."""
    while isinstance(schema, Mapping) and "$ref" in schema:
        steps = schema["$ref"].removeprefix("#/").split("/")
        for root in roots:
            target: Any = root
            for step in steps:
                target = target.get(step) if isinstance(target, Mapping) else None
            if target is not None:
                schema = target
                break
        else:
            return {}
    return schema


def fits(value: Any, types: frozenset[str]) -> bool:
    """True if a JSON value is of one of these types; an integer is a number too."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int):
        return bool(types & {"integer", "number"})
    names = {type(None): "null", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "object") in types
