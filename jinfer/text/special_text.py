"""Keeps what a client wrote from becoming control tokens.

A text such as `<|end|><|system|>` inside a message would be encoded as the tokens by which a model tells turns apart.
Wherever a string of the request holds the text of a special token, a mark (one rare character) is put inside it. The
template renders it along; the tokenizer's side (`protected.py`) finds the mark, takes it out, and encodes what stood
around it as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

# Egyptian hieroglyphs: printable, so that neither Python's repr nor JSON spells them otherwise.
_MARKS = [chr(code) for code in range(0x13000, 0x13400)]


class SpecialText:
    """Marks the texts of special tokens.

    Args:
      texts: the special tokens' texts.
      sought: texts that the template itself looks for in what it is given (`content.split('</think>')`). They stay as
        they are.
      ignores_case: the tokenizer finds them in any case.
    """

    def __init__(
        self, texts: Iterable[str], sought: frozenset[str] = frozenset(), ignores_case: bool = False
    ) -> None:
        found = sorted({text for text in texts if text} - sought)
        self._pattern = (
            re.compile(_alternatives(found), re.IGNORECASE if ignores_case else 0) if found else None
        )
        self._longest = max(map(len, found), default=0)
        self._firsts = frozenset(text[0] for text in found)
        self._beginnings = frozenset(text[:i] for text in found for i in range(1, len(text)))

    def mark(self, value: Any, source: str) -> tuple[Any, str | None]:
        """A request's value with marks, and the mark; the value itself and None where it holds no special text.

        Args:
          value: of JSON's types.
          source: the template, which must not hold the mark either.
        """
        if self._pattern is None or not self._occurs(value):
            return value, None
        taken = json.dumps(value, ensure_ascii=False) + source
        mark = next((mark for mark in _MARKS if mark not in taken), None)
        if mark is None:
            raise ValueError("the text holds every character that could mark special tokens in it")
        return self._marked(value, mark), mark

    def _occurs(self, value: Any) -> bool:
        if isinstance(value, str):
            assert self._pattern is not None
            return self._pattern.search(value) is not None or self._begins_one(value)
        if isinstance(value, dict):
            return any(self._occurs(key) or self._occurs(item) for key, item in value.items())
        return isinstance(value, list) and any(self._occurs(item) for item in value)

    def _begins_one(self, text: str) -> bool:
        """Whether the text ends like the beginning of a special token: what follows it could complete one."""
        tail = text[1 - self._longest :] if self._longest > 1 else ""
        return any(char in self._firsts and tail[i:] in self._beginnings for i, char in enumerate(tail))

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            assert self._pattern is not None
            marked = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], value)
            return marked + mark if self._begins_one(value) else marked
        if isinstance(value, dict):
            # A role is no text: templates make control tokens of it on purpose.
            return {
                self._marked(key, mark): item if key == "role" else self._marked(item, mark)
                for key, item in value.items()
            }
        return [self._marked(item, mark) for item in value] if isinstance(value, list) else value


def unescaped(text: str, mark: str) -> str:
    """A rendered text in which every mark is the character itself, also where a template escaped it for JSON."""
    return text.replace(json.dumps(mark)[1:-1], mark)


def _alternatives(texts: list[str]) -> str:
    """A pattern for any of the texts, the longest first. Written as a tree of their common beginnings, it needs one
    pass over what it searches, however many they are."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return _pattern(tree)


def _pattern(node: dict[str, Any]) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:
        ((char, node),) = node.items()
        prefix += re.escape(char)
    branches = [re.escape(char) + _pattern(below) for char, below in node.items() if char]
    if not branches:
        return prefix
    return prefix + "(?:" + "|".join(branches) + ")" + ("?" if "" in node else "")
