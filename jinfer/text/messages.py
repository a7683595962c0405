"""Messages as clients send them, brought into the form that a chat template needs.

A message means the same whether an optional field is absent, null or empty. What the template has no place for is
refused by name. What has no effect on any model's prompt is passed over: `HARMLESS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinfer.errors import RequestError
from jinfer.text.plain import plain
from jinfer.text.template_needs import ABSENT, REASONING_FIELDS, Needs

ROLES = ("system", "developer", "user", "assistant", "tool")
# Read by almost every template, or by none without harm: the id of a call says which result is whose, and results
# stand in the order of their calls.
_FIELDS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", *REASONING_FIELDS})
# They speak to a server's cache or to a client's own books, never to a model.
HARMLESS = frozenset({"cache_control", "id", "annotations", "index", "status"})
_CALL_FIELDS = frozenset({"id", "type", "function", *HARMLESS})
# Clients' libraries add what they parsed of the arguments to what they send back.
_FUNCTION_FIELDS = frozenset({"name", "arguments", "parsed_arguments", *_CALL_FIELDS})
# A role of the template's own is a word; its syntax tree holds whole control tokens too.
_ROLE = re.compile(r"\w[\w-]*")
_TEXT_FIELDS = ("name", "tool_call_id", *REASONING_FIELDS)
_TEXT_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Parts that are no text; templates have words for them, the engine has not.
_MEDIA = frozenset(
    {
        "image",
        "image_url",
        "input_image",
        "video",
        "video_url",
        "input_video",
        "audio",
        "audio_url",
        "input_audio",
    }
    | {"file", "input_file"}
)
_SHOWN = 100  # characters of a client's words in an error

Message = dict[str, Any]


def refused(message: str, param: str = "messages", code: str | None = None) -> RequestError:
    return RequestError(message, param, code)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"


def fit(messages: Sequence[Any], needs: Needs) -> list[Message]:
    """The messages as the template takes them.

    Raises RequestError for what is no message, and for a role or field that the template does not read.
    """
    fitted = [_fit_message(message, f"messages[{i}]", needs) for i, message in enumerate(messages)]
    if needs.joins_systems:
        fitted = _join_systems(fitted)
    if needs.wants_result_names:
        _name_results(fitted)
    return fitted


def _fit_message(message: Any, where: str, needs: Needs) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refused(f"{where} is not an object with a role: expected role and content")
    role = message["role"]
    if role not in ROLES and not (role in needs.words and _ROLE.fullmatch(role)):
        raise refused(
            f"{where}.role is an unknown role, {role[:_SHOWN]!r}: the model's chat template does not read it, expected "
            f"one of {', '.join(ROLES)}"
        )
    if role == "developer" and not needs.has_developer:
        role = "system"
    fitted: Message = {"role": role}
    for name, value in message.items():
        if name in ("role", "content", *REASONING_FIELDS) or name in HARMLESS:
            continue
        if _is_empty(value) and (name != "tool_calls" or value != {}):
            continue
        if name not in _FIELDS and name not in needs.fields:
            raise refused(
                f"{where}.{name[:_SHOWN]} is not supported: the model's chat template does not read it, remove it",
                code="unsupported_field",
            )
        fitted[name] = value
    for name in _TEXT_FIELDS:
        value = message.get(name)
        if not _is_empty(value) and not isinstance(value, str):
            raise refused(f"{where}.{name} is {kind(value)}: expected a string")
    if "tool_calls" in fitted:
        fitted["tool_calls"] = _tool_calls(fitted["tool_calls"], where, needs)
    _fit_content(message, fitted, where, needs)
    _fit_reasoning(message, fitted, where, needs)
    return fitted


def unusual_fields(messages: Sequence[Message]) -> set[str]:
    """Names of fields that only this template's syntax tree spoke for."""
    return {name for message in messages for name in message} - _FIELDS


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _fit_content(message: Message, fitted: Message, where: str, needs: Needs) -> None:
    role, content = fitted["role"], message.get("content")
    if isinstance(content, list) and content:
        parts = [_fit_part(part, f"{where}.content[{i}]", role, needs) for i, part in enumerate(content)]
        if role in needs.takes_parts:
            fitted["content"] = parts
            return
        content = "\n".join(part["text"] for part in parts)
    elif content is None or content == []:
        # A turn of thoughts alone is one that was cut off by its length.
        may_lack = "tool_calls" in fitted or any(not _is_empty(message.get(f)) for f in REASONING_FIELDS)
        if content is None and not may_lack and role in ROLES:
            raise refused(f"{where}.content is missing: expected a string or a list of text parts")
        content = ""
    elif not isinstance(content, str):
        raise refused(f"{where}.content is {kind(content)}: expected a string or a list of text parts")
    if not content and "tool_calls" in fitted:
        content = needs.empty_content
    elif role in needs.wants_parts:
        content = [{"type": "text", "text": content}]
    if content != ABSENT:
        fitted["content"] = content


def _fit_part(part: Any, where: str, role: str, needs: Needs) -> dict[str, Any]:
    given = part.get("type", "text") if isinstance(part, dict) else kind(part)
    key = _TEXT_KINDS.get(given) if isinstance(given, str) else None
    is_own = (
        isinstance(given, str) and given in needs.words and given not in _MEDIA and role in needs.takes_parts
    )
    if not isinstance(part, dict) or not (key or is_own):
        raise refused(
            f"{where} is a part of type {str(given)[:_SHOWN]!r}; this model takes text only: expected "
            '{"type": "text", "text": ...}',
            code="unsupported_content",
        )
    fitted: dict[str, Any] = {"type": given}
    if key:
        if not isinstance(part.get(key), str):
            raise refused(f"{where}.{key} is {kind(part.get(key))}: expected a string")
        fitted = {"type": "text", "text": part[key]}
    for name, value in part.items():
        if name in ("type", key) or _is_empty(value) or name in HARMLESS:
            continue
        if name not in needs.fields or role not in needs.takes_parts:
            raise refused(
                f"{where}.{name[:_SHOWN]} is not supported: the model's chat template does not read it, remove it",
                code="unsupported_field",
            )
        fitted[name] = value
    return fitted


def _fit_reasoning(message: Message, fitted: Message, where: str, needs: Needs) -> None:
    given = [(name, message[name]) for name in REASONING_FIELDS if not _is_empty(message.get(name))]
    if not given:
        return
    name, reasoning = given[0]
    for other, words in given[1:]:
        if words != reasoning:
            raise refused(f"{where}.{name} and {where}.{other} say different things: send one of them")
    if needs.reasoning_part and fitted["role"] == "assistant":
        content = fitted.get("content") or []
        rest = [{"type": "text", "text": content}] if isinstance(content, str) else content
        fitted["content"] = [{"type": "thinking", "thinking": reasoning}, *rest]
        return
    if not needs.drops_reasoning or (fitted["role"] != "assistant" and not needs.reasoning_fields):
        raise refused(
            f"{where}.{name} cannot be shown: the model's chat template has no place for reasoning. Leave it out, or "
            "put it into the content",
            code="unsupported_field",
        )
    for field in needs.reasoning_fields:
        fitted[field] = reasoning


def _tool_calls(calls: Any, where: str, needs: Needs) -> list[Any]:
    """Tool calls with their arguments in the form that the template takes: clients send them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise refused(f"{where}.tool_calls is not a list of objects")
    return [_tool_call(call, f"{where}.tool_calls[{i}]", needs) for i, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str, needs: Needs) -> dict[str, Any]:
    if not isinstance(function := call.get("function"), dict):
        # Some clients, and a few templates, write the call without an envelope.
        return _function(call, where, needs)
    for name, value in call.items():
        if name not in _CALL_FIELDS and name not in needs.fields and not _is_empty(value):
            raise refused(f"{where}.{name[:_SHOWN]} is not supported: remove it", code="unsupported_field")
    return {"type": "function", **call, "function": _function(function, f"{where}.function", needs)}


def _function(function: dict[str, Any], where: str, needs: Needs) -> dict[str, Any]:
    if not isinstance(function.get("name"), str):
        raise refused(
            f"{where} has no name: expected a call as "
            '{"type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    for name, value in function.items():
        if name not in _FUNCTION_FIELDS and name not in needs.fields and not _is_empty(value):
            raise refused(f"{where}.{name[:_SHOWN]} is not supported: remove it", code="unsupported_field")
    function = {name: value for name, value in function.items() if name != "parsed_arguments"}
    given = function.get("arguments")
    arguments = read_json(given, where) if isinstance(given, str) and given else given
    if arguments is None or arguments == "":
        given, arguments = "{}", {}
    if not isinstance(arguments, dict | list):
        raise refused(
            f"{where} has arguments that are {kind(arguments)}: expected an object, or its JSON text"
        )
    if needs.arguments_are_text:
        arguments = given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": arguments}


def read_json(text: str, where: str) -> Any:
    """The value of a tool call's arguments. Raises RequestError."""
    try:
        return plain(json.loads(text), f"{where}: arguments")
    except RecursionError:
        raise refused(f"{where} has arguments that are nested too deeply") from None
    except RequestError:
        raise
    except ValueError as error:
        raise refused(f"{where} has arguments that are not JSON ({error})") from error


def _join_systems(messages: list[Message]) -> list[Message]:
    """The system messages at the beginning as one, for templates that show one."""
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    heads = messages[:count]
    if count < 2 or not all(m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in heads):
        return messages
    joined = {"role": "system", "content": "\n\n".join(m["content"] for m in heads if m["content"])}
    return [joined, *messages[count:]]


def _name_results(messages: list[Message]) -> None:
    """Gives results the name of the call that they answer, for templates that fail without it."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            if isinstance(function, Mapping) and isinstance(call.get("id"), str):
                names[call["id"]] = function.get("name", "")
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
