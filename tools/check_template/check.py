"""What becomes of each history: jinfer's prompt beside the one of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinfer.errors import UserError
from jinfer.text.chat import ChatTemplate
from jinfer.text.messages import fit
from tools.check_template.histories import History, histories

OUTCOMES = ("equal", "mapped", "refused", "dropped", "differs")
BAD = ("dropped", "differs")
_SHOWN = 300  # characters of a prompt in a detail


@dataclass(frozen=True)
class Cell:
    """What became of one history with one template; `detail` says how it was mapped, or why it was refused."""

    template: str
    history: str
    outcome: str
    detail: str = ""


def check(name: str, template: ChatTemplate) -> Iterator[Cell]:
    """One cell per history."""
    for title, history in histories().items():
        yield Cell(name, title, *_outcome(template, history))


def _outcome(template: ChatTemplate, history: History) -> tuple[str, str]:
    options = dict(history.options)
    try:
        ours = template.render(history.messages, **options)
    except UserError as error:
        return "refused", str(error)
    lost = [word for word in history.words if word not in ours]
    if lost:
        return "dropped", ", ".join(lost)
    options.pop("tools_are_optional", None)
    if ours == (theirs := _transformers(template, history.messages, options)):
        return "equal", ""
    # As sent, transformers fails or loses something. In the form that the template needs, it has to agree.
    needs = template.needs(template.choose(options.get("tools")))
    messages = fit(history.messages, needs)
    changes = _changes(history.messages, messages)
    for tools in (options.get("tools") or needs.empty_tools, needs.empty_tools):
        if ours == (theirs := _transformers(template, messages, options | {"tools": tools})):
            if tools != options.get("tools"):
                changes.append(f"tools -> {json.dumps(tools)}")
            return "mapped", "; ".join(changes) or "fields that ask for nothing left out"
    return "differs", f"jinfer: {ours[-_SHOWN:]!r}; transformers: {theirs[-_SHOWN:]!r}"


def _transformers(template: ChatTemplate, messages: list[Any], options: dict[str, Any]) -> str:
    """The prompt that transformers makes, or in its place the words of its error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given: dict[str, Any] = {"add_generation_prompt": True} | options
    variables: dict[str, Any] = given.pop("chat_template_kwargs", None) or {}
    source = template.source(template.choose(options.get("tools")))
    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=source, **given, **template.special_tokens, **variables
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return texts[0]


def _changes(sent: list[dict[str, Any]], fitted: list[dict[str, Any]]) -> list[str]:
    """In which fields the messages that a template gets differ from those that were sent."""
    changes: dict[str, None] = {}
    if len(sent) != len(fitted):
        return ["system messages joined"]
    for before, after in zip(sent, fitted, strict=True):
        if before["role"] != after["role"]:
            changes[f"{before['role']} -> {after['role']}"] = None
        old, new = before.get("content", "absent"), after.get("content", "absent")
        if type(old) is not type(new) or (old != new and not isinstance(old, list)):
            changes[f"content {_form(old)} -> {_form(new)}"] = None
        for old, new in zip(_arguments(before), _arguments(after), strict=False):
            if type(old) is not type(new):
                changes[f"arguments {_form(old)} -> {_form(new)}"] = None
        for name in sorted(after.keys() - before.keys() - {"content"}):
            changes[f"{name} filled in"] = None
        for name in sorted(before.keys() - after.keys() - {"content"}):
            changes[f"{name} left out"] = None
    return list(changes)


def _arguments(message: dict[str, Any]) -> list[Any]:
    return [call["function"].get("arguments", "absent") for call in message.get("tool_calls") or ()]


def _form(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "parts"
    if isinstance(value, dict):
        return "object"
    return {"": "empty", "absent": "absent"}.get(value, "text")
