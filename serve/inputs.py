"""Messages and prompts of a request, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.protocol import bad_request

Prompt = str | list[int]


def is_int(value: Any) -> bool:
    return type(value) is int  # bool is a subclass of int


def read_messages(value: Any) -> list[Any]:
    """The messages of a chat, one at least; what each of them may hold is the chat template's to say.

    Raises APIError (400) for anything but a list.
    """
    if not isinstance(value, list) or not value:
        given = "left out" if value is None else f"{_kind(value)}"
        raise bad_request(f"messages is {given}: expected a list of at least one message", "messages")
    return value


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
