"""What `LLM` takes for a prompt: text, token ids, or an object that holds either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypedDict

from jinfer.errors import RequestError


class TextPrompt(TypedDict):
    """A text to be tokenized."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids, special tokens included."""

    prompt_token_ids: Sequence[int]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
FORMS = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
KEYS = ("prompt", "prompt_token_ids")


def read_prompts(given: Prompt | Sequence[Prompt], name: str = "prompts") -> list[str | list[int]]:
    """One prompt or several, in any form or array, as a list of texts and lists of token ids.

    Ids that are no integers stay among them: the engine refuses them by name.

    Raises:
      RequestError: `given`, which the message calls `name`, has something else in it.
    """
    if isinstance(given, str | Mapping):
        return [_read(given, name)]
    many = listed(given)
    if many is None:
        raise RequestError(f"{name} is {shown(given)}, expected {FORMS}, or a list of such prompts")
    if many and isinstance(many[0], Integral):
        return [_plain_ids(many)]
    return [_read(prompt, f"{name}[{i}]") for i, prompt in enumerate(many)]


def _read(prompt: Any, name: str) -> str | list[int]:
    if isinstance(prompt, Mapping):
        return _read_object(prompt, name)
    if isinstance(prompt, str):
        return prompt
    ids = listed(prompt)
    if ids is None:
        raise RequestError(f"{name} is {shown(prompt)}, expected {FORMS}")
    return _plain_ids(ids)


def _read_object(prompt: Mapping[str, Any], name: str) -> str | list[int]:
    keys = list(prompt)
    if len(keys) != 1 or keys[0] not in KEYS:
        found = ", ".join(repr(key)[:60] for key in keys[:8]) or "no keys"
        raise RequestError(f"{name} is an object with {found}, expected one key: {' or '.join(KEYS)}")
    (key,), (value,) = keys, prompt.values()
    if key == "prompt":
        if not isinstance(value, str):
            raise RequestError(f"{name}['prompt'] is {shown(value)}, expected text")
        return value
    ids = None if isinstance(value, str) else listed(value)
    if ids is None:
        raise RequestError(f"{name}['prompt_token_ids'] is {shown(value)}, expected a list of token ids")
    return _plain_ids(ids)


def _plain_ids(ids: list[Any]) -> list[int]:
    """Token ids as Python integers, whatever kind of integer they are."""
    return [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for i in ids]


def listed(values: Any) -> list[Any] | None:
    """A sequence or array as a list, None for anything else."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    # Iterating over bytes gives integers, over an object its keys: neither is what its writer means.
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | bytearray | memoryview | Mapping):
        return None
    return list(values)


def shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
