"""JSON text that a JSON library would not write: repeated keys, NaN, numbers of 400 digits, halves of surrogate pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that is written as it is, in the place of a value."""

    text: str


class Pairs:
    """An object as a list of (key, value): keys may repeat."""

    def __init__(self, items: Iterable[tuple[str, Any]]) -> None:
        self.items = list(items)


def encode(value: Any) -> str:
    """The JSON text of a value, which may hold Raw and Pairs at any depth. Plain ASCII, but for what Raw has."""
    pieces: list[str] = []

    def hold(special: Any) -> str:
        """A string that stands for the text until the library has written the rest."""
        if isinstance(special, Raw):
            pieces.append(special.text)
        else:
            entries = (f"{json.dumps(key)}:{encode(item)}" for key, item in special.items)
            pieces.append("{" + ",".join(entries) + "}")
        return f"<<piece {len(pieces) - 1}>>"

    text = json.dumps(value, separators=(",", ":"), default=hold)
    for number, piece in enumerate(pieces):
        text = text.replace(f'"<<piece {number}>>"', piece, 1)
    return text
