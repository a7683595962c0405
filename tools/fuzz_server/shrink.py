"""Makes the body of a case that fails shorter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from tools.fuzz_server.cases import Case

Fails = Callable[[Case], Awaitable[bool]]


async def shrunk(case: Case, fails: Fails, tries: int) -> Case:
    """The shortest case found within `tries` that still fails. One whose body is no object stays as it is."""
    if case.fields is None:
        return case
    plain = case.with_fields(case.fields)
    tries -= 1
    if not await fails(plain):
        return case  # its framing or its client's manners are part of the fault
    case, progress = plain, True
    while progress and tries > 0:
        progress = False
        assert case.fields is not None
        for fields in _shorter(case.fields):
            if tries <= 0:
                break
            tries -= 1
            candidate = case.with_fields(fields)
            if await fails(candidate):
                case, progress = candidate, True
                break
    return case


def _shorter(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in fields:
        yield {key: value for key, value in fields.items() if key != name}
    for name, value in fields.items():
        if isinstance(value, (list, str)) and type(value) in (list, str) and len(value) > 1:
            half = len(value) // 2
            yield fields | {name: value[:half]}
            yield fields | {name: value[half:]}
