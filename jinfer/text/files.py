"""Reads the small JSON files that stand beside a tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from jinfer.errors import ModelError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, `{}` where the file does not exist.

    Raises:
      ModelError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def added_token(value: Any, special: bool = True) -> AddedToken:
    """An added token from the forms that tokenizer files write: its text, or an object of its settings."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
        settings = {"special": special} | {field: value[field] for field in fields if field in value}
        return AddedToken(value["content"], **settings)
    if isinstance(value, str):
        return AddedToken(value, special=special)
    raise ModelError(f"a special token is {value!r}, expected its text or an object with `content`")


def special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, AddedToken]:
    """The special tokens that have a name (`bos_token`, `eos_token`, ..., a family's own `*_token`).

    Args:
      folder: the model folder; older folders keep the names in `special_tokens_map.json`.
      config: the content of `tokenizer_config.json`.
    """
    named = {key: value for key, value in config.items() if _names_a_token(key, value)}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    if "added_tokens_decoder" not in config:
        older = read_json(folder / "special_tokens_map.json")
        named |= {key: value for key, value in older.items() if _names_a_token(key, value)}
    return {key: added_token(value) for key, value in named.items()}


def extra_special_tokens(config: dict[str, Any]) -> list[AddedToken]:
    """Special tokens without a name."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [added_token(value) for value in extra] if isinstance(extra, list) else []


def _names_a_token(key: str, value: Any) -> bool:
    if key in NAMED_TOKENS:
        return value is not None
    # `add_bos_token` and its like are booleans; a family's own token is its text or an object.
    is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    return key.endswith("_token") and is_token
