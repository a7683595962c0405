"""Reads the small JSON files that stand beside a tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from jinfer.errors import ModelError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Families whose own tokenizer class transformers takes, whatever plain one tokenizer_config.json names.
RECLASSED = ("qwen2",)


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
        settings = {"special": special} | {flag: value[flag] for flag in FLAGS if flag in value}
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


def is_changed_at_load(folder: Path, config: dict[str, Any]) -> bool:
    """True where transformers may make another tokenizer than what tokenizer.json says: it chooses another class by
    config.json, puts its own begin or end token around texts, or another file names a token that tokenizer.json lacks
    or has with other settings.
    """
    if "add_bos_token" in config or "add_eos_token" in config:
        return True
    if config and read_json(folder / "config.json").get("model_type") in RECLASSED:
        return True
    spec = read_json(folder / "tokenizer.json").get("added_tokens")
    known = {token.get("content"): token for token in spec or [] if isinstance(token, dict)}
    decoder = config.get("added_tokens_decoder")
    if decoder:
        declared = decoder.values() if isinstance(decoder, dict) else [None]
        if any(not isinstance(token, dict) or not _is_known(token, known) for token in declared):
            return True
    special = _declared_special(config)
    if decoder is None:  # where that stands, the older files are not read
        if read_json(folder / "added_tokens.json").keys() - known.keys():
            return True
        older = read_json(folder / "special_tokens_map.json")
        if None in older.values():
            return True
        special += _declared_special(older)
    texts = [token.get("content") if isinstance(token, dict) else token for token in special]
    return any(not isinstance(text, str) or not known.get(text, {}).get("special") for text in texts)


def _is_known(token: dict[str, Any], known: dict[Any, dict[str, Any]]) -> bool:
    """True if tokenizer.json has the token with the same settings."""
    there = known.get(token.get("content"))
    return there is not None and all(bool(token.get(flag)) == bool(there.get(flag)) for flag in FLAGS)


def _declared_special(values: dict[str, Any]) -> list[Any]:
    """Every special token that an object of a tokenizer's files names."""
    found = [value for key, value in values.items() if _names_a_token(key, value)]
    for key in ("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"):
        more = values.get(key) or []
        found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else [more]
    return found


def _names_a_token(key: str, value: Any) -> bool:
    if key in NAMED_TOKENS:
        return value is not None
    # `add_bos_token` and its like are booleans; a family's own token is its text or an object.
    is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
    return key.endswith("_token") and is_token
