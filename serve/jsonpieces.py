"""JSON in pieces, for answers that may have megabytes: json.dumps keeps Python's lock until all of it is written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

TEXT = 64 * 1024  # characters of a string that are
PIECE = 128 * 1024  # bytes


class Encoded(str):
    """JSON already."""

    __slots__ = ()


class Long:
    """A long list: its members may be made when their turn comes. They are plain values, or all of them Encoded.

    group: how many are encoded by one call.
    """

    __slots__ = ("group", "members")

    def __init__(self, members: Iterable[Any], group: int = 64) -> None:
        self.members, self.group = members, group


def dumps(value: Any, ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ascii, separators=(",", ":"))


def parts(value: Any, ascii: bool = False) -> Iterator[str]:
    """The JSON of a value in small parts. Dicts, lists and iterators may hold Long and Encoded at any depth.

    ascii: everything else is escaped; what is Encoded stays as it is.
    """
    if isinstance(value, Encoded):
        yield value
    elif isinstance(value, Long):
        yield from _long(value, ascii)
    elif isinstance(value, dict):
        before = "{"
        for key, member in value.items():
            yield f"{before}{dumps(key, ascii)}:"
            yield from parts(member, ascii)
            before = ","
        yield "}" if value else "{}"
    elif isinstance(value, list | Iterator):
        before = "["
        for member in value:
            yield before
            yield from parts(member, ascii)
            before = ","
        yield "]" if before == "," else "[]"
    elif isinstance(value, str) and len(value) > TEXT:
        yield '"'
        for start in range(0, len(value), TEXT):
            yield dumps(value[start : start + TEXT], ascii)[1:-1]
        yield '"'
    else:
        yield dumps(value, ascii)


def _long(long: Long, ascii: bool) -> Iterator[str]:
    before, members = "[", iter(long.members)
    while group := list(itertools.islice(members, long.group)):
        yield before
        yield ",".join(group) if isinstance(group[0], Encoded) else dumps(group, ascii)[1:-1]
        before = ","
    yield "]" if before == "," else "[]"


def pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value as UTF-8, in pieces of about PIECE bytes; one piece if it is short."""
    gathered: list[str] = []
    size = 0
    for part in parts(value):
        gathered.append(part)
        size += len(part)
        if size >= PIECE:
            yield "".join(gathered).encode()
            gathered, size = [], 0
    if gathered:
        yield "".join(gathered).encode()
