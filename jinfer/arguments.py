"""What `LLM` takes beside prompts, in the forms that callers have it: parameters, priorities, messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinfer.admission import read_priority
from jinfer.errors import RequestError
from jinfer.prompts import listed, shown
from jinfer.sampling.params import SamplingParams

FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))


def read_params(given: Any, count: int, default: Callable[[], SamplingParams]) -> list[SamplingParams]:
    """Sampling parameters for `count` prompts out of None, one for all, or an iterable of one each. One is a
    `SamplingParams` or a mapping of its fields.

    Raises:
      RequestError: something else is among them, or they are not as many as the prompts.
    """
    if given is None:
        return [default()] * count
    if isinstance(given, SamplingParams | Mapping):
        return [_one(given, "sampling_params")] * count
    many = listed(given)
    if many is None:
        raise RequestError(
            f"sampling_params is {shown(given)}, expected SamplingParams, a mapping of its fields, or one of them per "
            "prompt",
            "sampling_params",
        )
    if len(many) != count:
        raise RequestError(f"{len(many)} sampling_params for {count} prompts: give one, or one per prompt")
    return [_one(params, f"sampling_params[{i}]") for i, params in enumerate(many)]


def _one(given: Any, name: str) -> SamplingParams:
    if isinstance(given, SamplingParams):
        return given
    if not isinstance(given, Mapping):
        raise RequestError(
            f"{name} is {shown(given)}, expected SamplingParams or a mapping of its fields", "sampling_params"
        )
    for key in given:
        if key not in FIELDS:
            raise RequestError(
                f"{name} has no field {key!r}, expected {', '.join(FIELDS)}", "sampling_params"
            )
    return SamplingParams(**given)


def read_priorities(given: Any, count: int) -> list[int]:
    """Priorities for `count` prompts out of None or an iterable of integers.

    Raises:
      RequestError: something else is among them, or they are not as many as the prompts.
    """
    if given is None:
        return [0] * count
    many = listed(given)
    if many is None:
        raise RequestError(f"priority is {shown(given)}, expected one integer per prompt", "priority")
    if len(many) != count:
        raise RequestError(f"{len(many)} priorities for {count} prompts: give one per prompt", "priority")
    return [_priority(value, i) for i, value in enumerate(many)]


def _priority(value: Any, index: int) -> int:
    try:
        return read_priority(value)
    except RequestError as error:
        raise RequestError(f"of prompt {index}, {error}", "priority") from None


def read_chats(given: Any) -> list[list[Any]]:
    """Conversations out of one or several, each an iterable of messages. A message that can dump itself as a mapping,
    as the clients of public APIs make them, is dumped.

    Raises:
      RequestError: it is neither.
    """
    many = None if isinstance(given, Mapping) else listed(given)
    if many is None:
        raise RequestError(f"messages is {shown(given)}, expected a list of messages", "messages")
    chats = [None if _is_message(entry) else listed(entry) for entry in many]
    if not many or chats[0] is None:
        return [[_message(entry) for entry in many]]
    for i, chat in enumerate(chats):
        if chat is None:
            raise RequestError(f"messages[{i}] is {shown(many[i])}, expected a list of messages", "messages")
    return [[_message(entry) for entry in chat] for chat in chats if chat is not None]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping | str) or hasattr(value, "model_dump") or not isinstance(value, Iterable)


def _message(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
