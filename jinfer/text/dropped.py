"""Finds what a chat template leaves out of a conversation.

The conversation is rendered a second time with a mark in every text, and the marks are looked for in the result. A mark
is a word of ASCII letters and digits, so that no filter for case, JSON or space changes it beyond recognition.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jinfer.errors import RequestError
from jinfer.text.messages import refused
from jinfer.text.template_needs import Needs

# A text that a template changed with the mark in it may still stand in the prompt word for word.
_TELLING = 12  # characters


@dataclass
class _Leaf:
    """One text of the request: where it stands, its words, and what it is to the template."""

    where: str
    text: str
    kind: str
    message: int = 0


@dataclass
class _Marked:
    """A copy of a conversation with a mark in every text."""

    shift: int = 0  # messages that were joined with the first one
    nonce: str = field(default_factory=lambda: "q" + secrets.token_hex(4))
    leaves: list[_Leaf] = field(default_factory=list)

    def text(self, text: str, where: str, kind: str, message: int = 0) -> str:
        words = text.rstrip()
        if not words:
            return text
        self.leaves.append(_Leaf(where, words.strip(), kind, message))
        return words + self._mark(len(self.leaves) - 1) + text[len(words) :]

    def _mark(self, index: int) -> str:
        return f"{self.nonce}x{index}z"

    def missing(self, rendered: str) -> list[_Leaf]:
        # One pass, however many marks there are.
        found = {int(match[1]) for match in self._found(rendered)}
        return [leaf for i, leaf in enumerate(self.leaves) if i not in found]

    def rest(self, rendered: str) -> str:
        """The marked result without the texts whose marks are in it."""
        kept, end = [], 0
        for match in self._found(rendered):
            words = self.leaves[int(match[1])].text
            is_whole = rendered.endswith(words, end, match.start())
            kept.append(rendered[end : match.start() - len(words) * is_whole])
            end = match.end()
        return "\0".join([*kept, rendered[end:]])

    def up_to_end(self, rendered: str, index: int) -> str:
        """What of the marked result the model sees that goes on with the content of message `index`."""
        where = f"messages[{self._place(index)}].content"
        ends = {i for i, leaf in enumerate(self.leaves) if leaf.where.startswith(where)}
        last = max((m.end() for m in self._found(rendered) if int(m[1]) in ends), default=len(rendered))
        return rendered[:last]

    def _found(self, rendered: str) -> Iterator[re.Match[str]]:
        return re.finditer(self.nonce + r"x(\d+)z", rendered, re.IGNORECASE)

    def _place(self, index: int) -> int:
        """Of a message in the request."""
        return index + self.shift if index else 0

    def message(self, message: dict[str, Any], index: int, needs: Needs) -> dict[str, Any]:
        where = f"messages[{self._place(index)}]"
        marked = dict(message)
        kind = "call content" if message.get("tool_calls") else "content"
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = self.text(content, f"{where}.content", kind, index)
        elif isinstance(content, list):
            marked["content"] = [
                self._part(part, f"{where}.content[{i}]", kind, index) for i, part in enumerate(content)
            ]
        if isinstance(name := message.get("name"), str):
            kind = "result name" if message["role"] == "tool" else "name"
            marked["name"] = self.text(name, f"{where}.name", kind, index)
        if reasoning := next((message[f] for f in needs.reasoning_fields if f in message), None):
            kind = "reasoning" if message["role"] == "assistant" else "content"
            text = self.text(reasoning, f"{where}.{needs.reasoning_fields[0]}", kind, index)
            marked |= {f: text for f in needs.reasoning_fields if f in message}
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [
                self._call(call, f"{where}.tool_calls[{i}]", index) for i, call in enumerate(calls)
            ]
        return marked

    def _part(self, part: dict[str, Any], where: str, kind: str, message: int) -> dict[str, Any]:
        kind = kind if part["type"] == "text" else "reasoning"
        return {
            name: self.text(value, f"{where}.{name}", kind, message)
            if isinstance(value, str) and name != "type"
            else value
            for name, value in part.items()
        }

    def _call(self, call: dict[str, Any], where: str, message: int) -> dict[str, Any]:
        function = call.get("function")
        if isinstance(function, dict):
            return {**call, "function": self._call(function, where, message)}
        arguments: Any = call.get("arguments")
        mark = self._mark(len(self.leaves))
        if isinstance(arguments, str):
            self.leaves.append(_Leaf(where, arguments, "call", message))
            return {**call, "arguments": self._in_json_text(arguments, mark)}
        # The name would say nothing of the arguments: it stands among the tools too.
        values = arguments if isinstance(arguments, list) else list(arguments.values())
        words = max((v.strip() for v in values if isinstance(v, str)), key=len, default="")
        self.leaves.append(_Leaf(where, words, "call", message))
        if isinstance(arguments, list):
            return {**call, "arguments": [*arguments, mark]}
        if not arguments:
            return {**call, "name": str(call.get("name", "")) + mark, "arguments": {mark: mark}}
        # In the values too: a template may show those that it knows.
        shown = {k: v + mark if isinstance(v, str) and v.strip() else v for k, v in arguments.items()}
        return {**call, "arguments": {**shown, mark: mark}}

    @staticmethod
    def _in_json_text(text: str, mark: str) -> str:
        opening, brace, rest = text.partition("{")
        if not brace or opening.strip():
            return text + mark
        comma = "" if rest.lstrip().startswith("}") else ", "
        return f'{opening}{{"{mark}": "{mark}"{comma}{rest}'

    def tool(self, tool: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"tools[{index}]"
        function = tool.get("function")
        inner = function if isinstance(function, dict) else tool
        shown = next((f for f in ("description", "name") if isinstance(inner.get(f), str) and inner[f]), None)
        if shown:
            inner = {**inner, shown: self.text(inner[shown], f"{where}.{shown}", "tools")}
        return {**tool, "function": inner} if isinstance(function, dict) else inner

    def document(self, document: dict[str, Any], index: int) -> dict[str, Any]:
        """A document is shown by any of its texts: templates have their own way to name its source."""
        texts = [value for value in document.values() if isinstance(value, str) and value.strip()]
        if not texts:
            return document
        self.leaves.append(_Leaf(f"documents[{index}]", max(texts, key=len), "documents"))
        mark = self._mark(len(self.leaves) - 1)
        return {
            key: value + mark if isinstance(value, str) and value.strip() else value
            for key, value in document.items()
        }


def check_shown(
    rendered: str,
    variables: dict[str, Any],
    needs: Needs,
    render: Callable[[dict[str, Any]], str],
    tools_are_optional: bool = False,
    is_continued: bool = False,
    joined: int = 0,
) -> None:
    """Raises RequestError for the first thing of a request that the template left out.

    Args:
      rendered: what the template made of `variables`.
      variables: messages as `fit` made them, tools and documents.
      render: renders other variables; a failure means that the template cannot be checked this way, and the texts
        themselves are looked for.
      tools_are_optional: the tools may be left out: the request forbids to call them.
      is_continued: the prompt ends where the content of the last message does.
      joined: how many messages `fit` joined with the first one.
    """
    if not needs.reads_messages:
        return  # it shows nobody's messages, whatever they are
    marked = _Marked(joined)
    messages = variables["messages"]
    changed = {"messages": [marked.message(message, i, needs) for i, message in enumerate(messages)]}
    if variables.get("tools"):
        changed["tools"] = [marked.tool(tool, i) for i, tool in enumerate(variables["tools"])]
    if variables.get("documents"):
        changed["documents"] = [marked.document(each, i) for i, each in enumerate(variables["documents"])]
    try:
        made = render(variables | changed)
        if is_continued:
            made = marked.up_to_end(made, len(messages) - 1)
        missing, enough = marked.missing(made), _TELLING
    except Exception:
        made, missing, enough = "", marked.leaves, 1
    if not missing:
        return
    # What is true of many messages is found out once.
    answered = max(
        (i for i, m in enumerate(messages) if m["role"] != "tool" and not m.get("tool_calls")), default=-1
    )
    names = set(_called(messages))
    rest = marked.rest(made)
    for leaf in missing:
        if _is_habit(leaf, needs, answered, names, tools_are_optional):
            continue
        # Another text may hold the same words: what is shown of those does not count.
        others = made.count(leaf.text) - rest.count(leaf.text)
        if len(leaf.text) < enough or rendered.count(leaf.text) <= others:
            raise _refusal(leaf)


def _called(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The names of the tools that were called."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if isinstance(function, dict) and isinstance(name := function.get("name"), str):
                yield name


def _is_habit(leaf: _Leaf, needs: Needs, answered: int, names: set[str], tools_are_optional: bool) -> bool:
    """Whether the template was made to leave this out, as its model was trained.

    Args:
      answered: the index of the last message that is neither a call nor a result.
      names: the tools that were called.
    """
    if leaf.kind == "reasoning":
        return needs.drops_reasoning
    if leaf.kind == "call content":
        return needs.drops_call_content and answered > leaf.message
    if leaf.kind == "result name":
        return leaf.text in names  # it says once more what the call said
    return leaf.kind == "tools" and tools_are_optional


def _refusal(leaf: _Leaf) -> RequestError:
    param = leaf.where.partition("[")[0]
    why = {
        "call content": " beside tool calls: leave it out, or make it a message of its own",
        "name": ": leave it out, or put the name into the content",
    }
    return refused(
        f"{leaf.where} would be lost: the model's chat template has no place for it here"
        + why.get(leaf.kind, ": leave it out, or put it into a message that the template shows"),
        param,
        "unsupported_field",
    )
