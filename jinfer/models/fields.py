"""Typed getters over the JSON objects of a model folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jinfer.errors import ModelError

_REQUIRED: Any = object()


def _between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


class Fields:
    """Typed getters over one JSON object. Each raises ModelError naming the file, the key and what was
    expected.

    A key that is absent or null gives `default`; without a default it is an error. A null flag is false, as in
    transformers, whatever an absent one is.
    """

    def __init__(self, values: Mapping[str, Any], where: str, seen: set[str] | None = None):
        self.values = values
        self.where = where
        self.seen: set[str] = set() if seen is None else seen  # keys that somebody asked for
        self.defaults: Mapping[str, Any] = {}  # a family's own; for keys whose null is no meaning of its own

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """The same object where keys that are absent have these values; a null stays a null."""
        result = self.with_values({**defaults, **self.values})
        result.defaults = {**self.defaults, **defaults}
        return result

    def with_values(self, values: Mapping[str, Any]) -> Fields:
        """The same object, its readers counted together with this one's, with these values."""
        result = Fields(values, self.where, self.seen)
        result.defaults = self.defaults
        return result

    def with_aliases(self, aliases: Mapping[str, str]) -> Fields:
        """The same object where a key of `aliases` stands for the one that it names, and goes before it."""
        found = {name: self.values[alias] for alias, name in aliases.items() if alias in self.values}
        self.seen.update(aliases)
        return self.with_values({**self.values, **found})

    def idle(self, *keys: str) -> None:
        """Says that the value of another key makes these ones ask for nothing."""
        self.seen.update(keys)

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raises ModelError if the key is there with a value other than null and these."""
        if self.has(key) and self.values[key] not in allowed:
            shown = " or ".join(repr(value) for value in (*allowed, None))
            raise self.error(key, f"{shown}: other values are not supported")

    def error(self, key: str, expected: str) -> ModelError:
        shown = repr(self.values.get(key))
        return ModelError(f"{self.where}: {key} is {shown[:120]}, expected {expected}")

    def has(self, key: str) -> bool:
        self.seen.add(key)
        return self.values.get(key) is not None

    def integer(self, key: str, *, low: int, high: int, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float = 1e18, default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, *, default: Any = _REQUIRED) -> Any:
        if key in self.values and self.values[key] is None:
            self.seen.add(key)
            return False
        value = self._value(key, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, *, choices: Collection[str] = (), default: Any = _REQUIRED) -> Any:
        value = self._value(key, default)
        if value is default:
            return value
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.error(key, f"one of {', '.join(sorted(choices))}" if choices else "a string")
        return value

    def section(self, key: str) -> Fields | None:
        """The getters of an object inside this one; None if it is absent, null or empty."""
        self.seen.add(key)
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, f"{self.where}: {key}") if value else None

    def integers(self, key: str, *, low: int, high: int) -> tuple[int, ...]:
        """One integer or a list of them, as a tuple; () if absent."""
        self.seen.add(key)
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high for v in found):
            raise self.error(key, f"an integer from {low} to {high} or a list of them")
        return tuple(found)

    def numbers(self, key: str, *, low: float, high: float, count: int) -> tuple[float, ...]:
        """A list of so many numbers."""
        self.seen.add(key)
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(_between(v, low, high) for v in value)
        ):
            raise self.error(key, f"a list of {count} numbers from {low:g} to {high:g}")
        return tuple(float(v) for v in value)

    def strings(self, key: str, *, choices: Collection[str], count: int) -> tuple[str, ...] | None:
        """A list of so many strings, each one of the choices; None if absent."""
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or any(v not in choices for v in value):
            raise self.error(key, f"a list of {count} of {', '.join(sorted(choices))}")
        return tuple(value)

    def _value(self, key: str, default: Any) -> Any:
        self.seen.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"{self.where} lacks {key}{' (it is null)' if key in self.values else ''}")
        return default
