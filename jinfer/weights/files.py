"""Small files of a model folder, read with limits and with errors that name them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinfer.errors import ModelError

# The largest known index (a 1T-parameter mixture of experts) has 14 MB; a config has kilobytes.
JSON_LIMIT = 128 * 1024 * 1024


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError if it is missing, too large, broken or no object."""
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise ModelError(f"{path} has {size} bytes, expected a JSON file of at most {JSON_LIMIT}")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: expected a model folder with config.json and safetensors"
        ) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json_object(raw, str(path))


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """The object that UTF-8 JSON text holds. Raises ModelError, naming `what`, for anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ModelError(f"{what} is nested too deeply to be JSON of a model") from None
    except ValueError as error:  # broken JSON or UTF-8, a number too long, a repeated key
        raise ModelError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            seen.add(key)
    return values


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first names of a list that may be long, of names that may be long: `a, b, c and 40 more`."""
    listed = list(names)
    shown = ", ".join(name[:300] for name in listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
