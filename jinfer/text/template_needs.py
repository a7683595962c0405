"""What a chat template needs of the messages it is given: found out once, when it is loaded.

Its syntax tree says which names it reads. How it takes content, tool calls and reasoning is seen from what it makes of
small probes: every form of a message that clients send is tried, and the first that the template shows whole is kept.
Imports jinja2 alone: the process that renders starts with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from jinja2 import meta, nodes

from jinfer.text.sandbox import TemplateLimitError

# A message's reasoning arrives under several names, and templates read it under several.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning", "thought")
ABSENT = "absent"
STUDY_SECONDS = 3.0  # of all probes together; what is not found out by then keeps its default

_SEARCHES = frozenset(
    {"split", "rsplit", "startswith", "endswith", "replace", "partition", "rpartition", "find", "rfind"}
    | {"index", "rindex", "count", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix"}
)
_FIRST, _SECOND = "qzprobea", "qzprobeb"  # words that no template has
_KEY = "qzkey"
_TOOL = {
    "type": "function",
    "function": {
        "name": "qztool",
        "description": "a tool",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "a word"}}},
    },
}


@dataclass(frozen=True)
class Needs:
    """What one template needs. Plain values: it travels as JSON.

    Attributes:
      words: the constants of its syntax tree: the roles and kinds of parts that it can know.
      fields: the names that it reads of messages and other objects.
      reads_messages: it looks at the messages at all.
      sought: the constants that it looks for inside a text (`content.split('</think>')`).
      has_developer: it shows messages of the role `developer` as such.
      takes_parts: roles whose content it shows when it is a list of parts.
      wants_parts: roles whose content it shows only then.
      arguments_are_text: of tool calls; else they are objects.
      empty_content: what the content of a message with nothing but tool calls has to be: "", None or `ABSENT`.
      empty_tools: what `tools` has to be where there are none: None, [] or `ABSENT`.
      reasoning_fields: the names under which it reads a message's reasoning.
      reasoning_part: reasoning is a part `{"type": "thinking", "thinking": text}` of the content.
      drops_reasoning: leaving reasoning out of some turns is its habit: it reads it for others, or cuts it out of texts.
      drops_call_content: it shows the text beside a tool call in the current turn, so leaving it out later is its habit.
      joins_systems: it shows one system message at the beginning, and not two.
      wants_result_names: it fails on a tool's result that has no `name`.
    """

    words: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    reads_messages: bool = True
    sought: frozenset[str] = frozenset()
    has_developer: bool = False
    takes_parts: frozenset[str] = frozenset()
    wants_parts: frozenset[str] = frozenset()
    arguments_are_text: bool = False
    empty_content: str | None = ""
    empty_tools: Any = None
    reasoning_fields: tuple[str, ...] = ()
    reasoning_part: bool = False
    drops_reasoning: bool = False
    drops_call_content: bool = False
    joins_systems: bool = False
    wants_result_names: bool = False

    def to_json(self) -> dict[str, Any]:
        return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Needs:
        kinds = {f.name: str(f.type) for f in fields(cls)}
        made: dict[str, Any] = {
            name: frozenset(value) if "frozenset" in kinds[name] else value for name, value in values.items()
        }
        made["reasoning_fields"] = tuple(values["reasoning_fields"])
        return cls(**made)


def study(tree: nodes.Template, render: Callable[[dict[str, Any]], str]) -> Needs:
    """The needs of a template.

    Args:
      tree: its syntax tree.
      render: renders it with variables; whatever it raises means that it cannot show them.
    """
    words, read = frozenset(_words(tree)), frozenset(_fields(tree))
    probes = _Probes(render)
    empty_tools = probes.empty_tools()
    arguments_are_text, empty_content = probes.call_forms(_tests_for_none(tree))
    takes, wants = probes.content_forms()
    reasoning_part = "thinking" in words and probes.shows_reasoning_part()
    reasoning_fields = () if reasoning_part else tuple(name for name in REASONING_FIELDS if name in read)
    return Needs(
        words=words,
        fields=read,
        reads_messages="messages" in meta.find_undeclared_variables(tree),
        sought=frozenset(_sought(tree)),
        has_developer="developer" in words
        and probes.shows({"role": "developer", "content": _FIRST}, _user()),
        takes_parts=takes,
        wants_parts=wants,
        arguments_are_text=arguments_are_text,
        empty_content=empty_content,
        empty_tools=empty_tools,
        reasoning_fields=reasoning_fields,
        reasoning_part=reasoning_part,
        drops_reasoning=bool(reasoning_fields) or probes.cuts_thoughts(),
        drops_call_content=probes.shows(_user(), probes.call(content=_FIRST), probes.result(name="qztool")),
        joins_systems=not probes.shows_two_systems() and probes.shows(_system(_FIRST), _user()),
        wants_result_names=probes.wants_result_names(),
    )


def _words(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all(nodes.Const):
        if isinstance(node.value, str):
            yield node.value


def _fields(tree: nodes.Template) -> Iterator[str]:
    """Names that are read as attribute or key, or asked for by `in` or `get`."""
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Call)):
        if isinstance(node, nodes.Getattr):
            yield node.attr
            continue
        if isinstance(node, nodes.Getitem):
            given: list[nodes.Node] = [node.arg]
        elif isinstance(node, nodes.Compare):
            given = [node.expr] if any(operand.op in ("in", "notin") for operand in node.ops) else []
        else:
            given = list(node.args[:1]) if getattr(node.node, "attr", "") in ("get", "pop") else []
        for const in given:
            if isinstance(const, nodes.Const) and isinstance(const.value, str):
                yield const.value


def _sought(tree: nodes.Template) -> Iterator[str]:
    """Constants that are compared with a text, or searched for in one."""
    for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        if isinstance(node, nodes.Compare):
            places: list[nodes.Node] = [node.expr, *(operand.expr for operand in node.ops)]
        elif isinstance(node, nodes.Call):
            is_search = isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHES
            places = list(node.args) if is_search else []
        else:
            places = list(node.args) if getattr(node, "name", "") in _SEARCHES else []  # pyright: ignore[reportAttributeAccessIssue]
        for place in places:
            for const in [place, *place.find_all(nodes.Const)]:
                if isinstance(const, nodes.Const) and isinstance(const.value, str):
                    yield const.value


def _tests_for_none(tree: nodes.Template) -> bool:
    """Whether a message's content is compared with none."""

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return (
            isinstance(node, nodes.Getitem)
            and isinstance(node.arg, nodes.Const)
            and node.arg.value == "content"
        )

    tests = (t for t in tree.find_all(nodes.Test) if t.name == "none" and is_content(t.node))
    compares = (
        c
        for c in tree.find_all(nodes.Compare)
        if is_content(c.expr) and any(isinstance(o.expr, nodes.Const) and o.expr.value is None for o in c.ops)
    )
    return any(True for _ in tests) or any(True for _ in compares)


def _user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def _system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


class _Probes:
    """Renders conversations with words that no template has, and looks for them."""

    def __init__(self, render: Callable[[dict[str, Any]], str]) -> None:
        self._render = render
        self._deadline = time.monotonic() + STUDY_SECONDS
        self._empty_tools: Any = None
        self._arguments_are_text = False
        self._empty_content: str | None = ""

    def text(self, messages: Sequence[dict[str, Any]], tools: Any = None, **variables: Any) -> str | None:
        """What the template makes of it, None where it fails."""
        if time.monotonic() > self._deadline:
            return None
        tools = tools or self._empty_tools
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": False}
        if tools == ABSENT:
            del given["tools"]
        try:
            # A copy: no probe sees what a template did to the one before.
            return self._render(json.loads(json.dumps(given | variables))).lower()
        except (TemplateLimitError, MemoryError):
            self._deadline = 0.0  # a template that takes too long over a greeting is tried no further
            return None
        except Exception:
            return None

    def texts(self, *messages: dict[str, Any], **variables: Any) -> Iterator[str]:
        """With and without tools, those that render."""
        for tools in (None, [_TOOL]):
            if (text := self.text(messages, tools, **variables)) is not None:
                yield text

    def shows(self, *messages: dict[str, Any], word: str = _FIRST, **variables: Any) -> bool:
        return any(word in text for text in self.texts(*messages, **variables))

    def empty_tools(self) -> Any:
        best, found = 0, None
        for form in (None, [], ABSENT):
            self._empty_tools = form
            shows = self.text([_user()]) is not None or self.text([_system("x"), _user()]) is not None
            # Some look at the tools only where there are documents.
            score = 2 * shows + (self.text([_user()], documents=[{"title": "t", "text": "x"}]) is not None)
            if score > best:
                best, found = score, form
            if best == 3:
                break
        self._empty_tools = found
        return found

    def call(self, content: Any = ABSENT, **fields: Any) -> dict[str, Any]:
        """A message that calls a tool, in the forms found out so far."""
        arguments: Any = {_KEY: _SECOND}
        if self._arguments_are_text:
            arguments = json.dumps(arguments)
        function = {"name": "qztool", "arguments": arguments}
        message: dict[str, Any] = {"role": "assistant"}
        content = self._empty_content if content == ABSENT else content
        if content != ABSENT:
            message["content"] = content
        calls = [{"type": "function", "id": "abcdef123", "function": function}]
        return message | {"tool_calls": calls} | fields

    def result(self, content: Any = "done", **fields: Any) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": "abcdef123", "content": content, **fields}

    def call_forms(self, tests_for_none: bool) -> tuple[bool, str | None]:
        """The form of arguments and of empty content under which a call is shown best."""
        contents = (None, "", ABSENT) if tests_for_none else ("", None, ABSENT)
        best, found = 0, (False, "")
        for as_text in (False, True):
            for content in contents:
                self._arguments_are_text, self._empty_content = as_text, content
                score = max((self._score(text) for text in self._call_texts()), default=0)
                if score > best:
                    best, found = score, (as_text, content)
        self._arguments_are_text, self._empty_content = found
        return found

    def _call_texts(self) -> Iterator[str]:
        named = self.result(name="qztool")
        for messages in ((_user(), self.call(), named, _user()), (_user(), self.call())):
            yield from self.texts(*messages)

    @staticmethod
    def _score(text: str) -> int:
        """0: the call is not shown; 1: as Python's repr, or as JSON inside JSON; 2: as it should be."""
        if _SECOND not in text:
            return 0
        is_odd = f"'{_KEY}': '{_SECOND}'" in text or f'\\"{_SECOND}' in text
        return 1 if is_odd else 2

    def content_forms(self) -> tuple[frozenset[str], frozenset[str]]:
        """The roles whose content may be parts, and those for which it has to be."""
        takes, wants = set(), set()
        for role in ("user", "system", "assistant", "tool"):
            parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND + "2"}]
            shows_text = shows_one = False
            for tools in (None, [_TOOL]):
                plain = self.text(self._frame(role, _FIRST), tools)
                shows_text |= _FIRST in (plain or "")
                shown = self.text(self._frame(role, parts), tools) or ""
                # A list that is printed as it is shows its keys too.
                keys = shown.count("type") if plain is None else plain.count("type")
                if self._shows_parts(shown) and shown.count("type") <= keys:
                    takes.add(role)
                one = self.text(self._frame(role, parts[:1]), tools) or ""
                shows_one |= _FIRST in one and one.count("type") <= keys
            if shows_one and not shows_text:  # of several parts it may show the first alone
                wants.add(role)
        return frozenset(takes), frozenset(wants)

    def _frame(self, role: str, content: Any) -> list[dict[str, Any]]:
        """A conversation with a message of this role."""
        if role == "user":
            return [_user(content)]
        if role == "system":
            return [_system(content), _user()]
        if role == "assistant":
            return [_user(), _assistant(content), _user()]
        return [_user(), self.call(), self.result(content, name="qztool")]

    @staticmethod
    def _shows_parts(text: str) -> bool:
        first, second = text.find(_FIRST), text.find(_SECOND + "2")
        return 0 <= first < second

    def shows_reasoning_part(self) -> bool:
        parts = [{"type": "thinking", "thinking": _FIRST}, {"type": "text", "text": _SECOND}]
        return any(_SECOND in text for text in self._with_first(_user(), _assistant(parts)))

    def cuts_thoughts(self) -> bool:
        """Whether it takes out of an earlier answer what stands between marks of thinking."""
        thought = _assistant(f"<think>\n{_FIRST}\n</think>\n\n{_SECOND}")
        texts = list(self.texts(_user(), thought, _user()))
        return any(_SECOND in text and _FIRST not in text for text in texts)

    def shows_two_systems(self) -> bool:
        return any(_SECOND in text for text in self._with_first(_system(_FIRST), _system(_SECOND), _user()))

    def _with_first(self, *messages: dict[str, Any]) -> Iterator[str]:
        return (text for text in self.texts(*messages) if _FIRST in text)

    def wants_result_names(self) -> bool:
        without = any(self.texts(_user(), self.call(), self.result()))
        return not without and any(self.texts(_user(), self.call(), self.result(name="qztool")))
