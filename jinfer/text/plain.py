"""What a request holds, of JSON's types only."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from jinfer.errors import RequestError

# Levels of lists and objects inside one another. Schemas of real tools have under twenty; a template that indents JSON
# writes every level's spaces on every line.
MAX_DEPTH = 64


def plain(value: Any, where: str, depth: int = MAX_DEPTH) -> Any:
    """The value of JSON's types: another object has methods, and no way to the process that renders.

    What is of those types already is not copied: a body may hold millions of lists.

    Raises:
      RequestError: it holds something else, or is nested deeper than `depth`; `param` is the field that
        `where` begins with.
    """
    if _is_scalar(value):
        return value
    if depth == 0:
        raise RequestError(
            f"{where} is nested more than {MAX_DEPTH} levels deep, expected at most that: flatten it",
            where.partition("[")[0],
        )
    if type(value) is dict and all(type(key) is str for key in value):
        items = {key: plain(item, where, depth - 1) for key, item in value.items() if not _is_scalar(item)}
        return value if all(value[key] is item for key, item in items.items()) else value | items
    if type(value) is list:
        found = [item if _is_scalar(item) else plain(item, where, depth - 1) for item in value]
        return value if all(map(operator.is_, found, value)) else found
    if isinstance(value, Mapping):
        return {str(key): plain(item, where, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth - 1) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump(exclude_none=True), where, depth)
    raise RequestError(f"{where} holds a {type(value).__name__}, expected JSON values", where)


def _is_scalar(value: Any) -> bool:
    return value is None or type(value) in (str, int, float, bool)
