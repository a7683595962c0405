"""Choosing between the implementations of one op.

An op lists its implementations. A caller either names one, and then gets exactly that one or an error that says why it
cannot serve, or says `"auto"`, and then gets the first one in the op's order that can. What automatic choice settled
on is logged once per distinct reason, so a slow path is never taken silently.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import jax

logger = logging.getLogger(__name__)

AUTO = "auto"

T = TypeVar("T")


class ImplementationError(ValueError):
    """An implementation was named that does not exist, or that cannot serve this platform, shape or dtype."""


class Registry(Generic[T]):
    """The implementations of one op, in no particular order.

    `platform_order` maps a platform name (`"cpu"`, `"tpu"`, `"gpu"`) to the names that automatic choice tries there,
    best first; platforms it does not list use the order under `"*"`.
    """

    def __init__(self, op: str, platform_order: dict[str, tuple[str, ...]]):
        self.op = op
        self.platform_order = platform_order
        self._members: dict[str, T] = {}

    def add(self, name: str, member: T) -> None:
        if name == AUTO or name in self._members:
            raise ValueError(f"{self.op}: implementation name {name!r} is taken")
        self._members[name] = member

    def __getitem__(self, name: str) -> T:
        return self._members[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._members))

    def choose(
        self, implementation: str, why_not: Callable[[T], str | None], platform: str | None = None
    ) -> tuple[str, T]:
        """Returns the name and the implementation to run.

        `why_not(member)` returns None when the member can serve the call, else a sentence with the reason.
        `platform` is where the call will run, if not where jax places it: it may be compiled for a device elsewhere.

        Raises:
          ImplementationError: the named implementation is unknown or refuses, or automatic choice found none.
        """
        if implementation != AUTO:
            if implementation not in self._members:
                raise ImplementationError(
                    f"{self.op}: unknown implementation {implementation!r}: use {AUTO!r} or one of {list(self.names)}"
                )
            member = self._members[implementation]
            reason = why_not(member)
            if reason is not None:
                raise ImplementationError(
                    f"{self.op}: implementation {implementation!r} cannot serve: {reason}"
                )
            return implementation, member
        return self._first(self._auto_order(platform or current_platform()), why_not)

    def _auto_order(self, platform: str) -> tuple[str, ...]:
        order = self.platform_order.get(platform, self.platform_order["*"])
        return tuple(name for name in order if name in self._members)

    def _first(self, order: Iterable[str], why_not: Callable[[T], str | None]) -> tuple[str, T]:
        refusals = []
        for name in order:
            reason = why_not(self._members[name])
            if reason is None:
                for refused, why in refusals:
                    _log_fallback(self.op, refused, name, why)
                return name, self._members[name]
            refusals.append((name, reason))
        told = "; ".join(f"{name}: {why}" for name, why in refusals) or "none is registered for this platform"
        raise ImplementationError(f"{self.op}: no implementation can serve on {current_platform()}: {told}")


def current_platform() -> str:
    """`"cpu"`, `"tpu"` or `"gpu"`: where jax places a computation that nothing else places."""
    platform = jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


@functools.cache  # one line per distinct reason and process, however often the op is traced
def _log_fallback(op: str, refused: str, taken: str, reason: str) -> None:
    logger.warning("%s: using %r instead of %r: %s", op, taken, refused, reason)
