"""Messages and prompts of a request, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.protocol import bad_request

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", *TEXT_FIELDS})
# Fields that clients copy from an earlier answer into the history.
EMPTY_MESSAGE_FIELDS = frozenset(
    {
        "refusal",
        "audio",
        "function_call",
        "annotations",
        "partial",
        "prefix",
        "provider_specific_fields",
        "reasoning_details",
        "thinking_blocks",
    }
)
HARMLESS_MESSAGE_FIELDS = frozenset({"id"})  # under which a client has stored the message

Prompt = str | list[int]


def is_int(value: Any) -> bool:
    return type(value) is int  # bool is a subclass of int


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Messages for the chat template, their null fields left out.

    Raises APIError (400) for anything that is not text.
    """
    if not isinstance(value, list) or not value:
        given = "left out" if value is None else f"{_kind(value)}"
        raise bad_request(f"messages is {given}: expected a list of at least one message", "messages")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_request(
            f"{where} is {_kind(message)}: expected an object with role and content", "messages"
        )
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(
            f"{where}.role is {str(role)[:60]!r}: expected one of {', '.join(ROLES)}", "messages"
        )
    for name, value in message.items():
        if name in HARMLESS_MESSAGE_FIELDS or (name in EMPTY_MESSAGE_FIELDS and not value):
            continue
        if name not in MESSAGE_FIELDS:
            raise bad_request(
                f"{where}.{name[:100]} is not supported: remove it", "messages", "unsupported_field"
            )
    clean = {name: value for name, value in message.items() if name in MESSAGE_FIELDS and value is not None}
    for name in TEXT_FIELDS:
        if name in clean and not isinstance(clean[name], str):
            raise bad_request(f"{where}.{name} is {_kind(clean[name])}: expected a string", "messages")
    calls = clean.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise bad_request(f"{where}.tool_calls is not a list of objects", "messages")
    if "content" not in clean and not (role == "assistant" and calls):
        raise bad_request(
            f"{where}.content is missing: expected a string or a list of text parts", "messages"
        )
    if "content" in clean:
        clean["content"] = _read_content(clean["content"], where)
    return clean


def _read_content(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(
            f"{where}.content is {_kind(content)}: expected a string or a list of parts", "messages"
        )
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind not in ("text", "input_text", "refusal"):
            raise bad_request(
                f"{where}.content[{i}] has type {str(kind)[:60]!r}: this server takes text only",
                "messages",
                "unsupported_content",
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise bad_request(f"{where}.content[{i}].text is {_kind(text)}: expected a string", "messages")
        parts.append({"type": "text", "text": text})
    return parts


def read_tools(tools: Any, tool_choice: Any) -> list[dict[str, Any]] | None:
    """Tools for the chat template. Calls in the output are not parsed, so tool_choice has to be 'none'."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise bad_request("tools is not a list of objects", "tools")
    if tool_choice not in (None, "none") and (tools or tool_choice != "auto"):
        shown = tool_choice if isinstance(tool_choice, str) else "a named tool"
        raise bad_request(
            f"tool_choice {shown!r} is not supported: this server does not parse tool calls. With tool_choice "
            "'none' the tools are shown to the model and its answer comes as plain text",
            "tool_choice",
            "unsupported_field",
        )
    if tools and tool_choice is None:
        raise bad_request(
            "tools without tool_choice 'none' is not supported: this server shows tools to the model but does not "
            "parse tool calls from its answer",
            "tools",
            "unsupported_field",
        )
    return tools or None


def read_documents(value: Any) -> list[dict[str, Any]] | None:
    """Documents for the chat template."""
    if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise bad_request("documents is not a list of objects", "documents")
    return value or None


def read_prompts(value: Any, name: str = "prompt") -> list[Prompt]:
    """Prompts of a text completion or the inputs of an embedding: a string, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if is_int(value[0]):
            return [read_token_ids(value, name)]
        if all(isinstance(item, list) for item in value):
            return [read_token_ids(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise bad_request(
        f"{name} is {'left out' if value is None else _kind(value)}: expected a string, a list of token ids, or a "
        "list of either",
        name,
    )


def read_token_ids(value: Any, where: str) -> list[int]:
    """A list of integers; whether they are inside the vocabulary is the engine's to say."""
    param = where.partition("[")[0]
    if not isinstance(value, list):
        raise bad_request(
            f"{where} is {'left out' if value is None else _kind(value)}: expected token ids", param
        )
    for i, item in enumerate(value):
        if not is_int(item):
            raise bad_request(f"{where}[{i}] is {_kind(item)}: expected a token id (an integer)", param)
    return value


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises APIError (400) for an id outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise bad_request(
            f"token id {_short(wrong)} is outside the vocabulary: ids go from 0 to {vocab_size - 1}", param
        )


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**18 else f"of {number.bit_length()} bits"


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"
