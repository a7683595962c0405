"""What a request holds, rebuilt of JSON's types only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinfer.errors import RequestError

# Levels of lists and objects inside one another. Schemas of real tools have under twenty; a template that indents JSON
# writes every level's spaces on every line.
MAX_DEPTH = 64


def plain(value: Any, where: str, depth: int = MAX_DEPTH) -> Any:
    """The value rebuilt of JSON's types: another object has methods, and no way to the process that renders.

    Raises:
      RequestError: it holds something else, or is nested deeper than `depth`; `param` is the field that
        `where` begins with.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == 0:
        raise RequestError(
            f"{where} is nested more than {MAX_DEPTH} levels deep, expected at most that: flatten it",
            where.partition("[")[0],
        )
    if isinstance(value, Mapping):
        return {str(key): plain(item, where, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth - 1) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump(exclude_none=True), where, depth)
    raise RequestError(f"{where} holds a {type(value).__name__}, expected JSON values", where)
