"""Signal handlers held back while the engine's state is half changed.

Python runs a signal's handler in the main thread between any two bytecodes, so what a handler raises (KeyboardInterrupt,
an alarm's error) could land between the donation of a buffer to a step and the keeping of its successor. Masking the
signal in this thread does not help: the kernel gives it to another one, and Python runs the handler here all the same.
So each handler is replaced by a stand-in, which passes signals on at once, or while they are held only notes them.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

Handler = Callable[[int, FrameType | None], Any]
# What a fault of the process itself raises is not held back: the code that caused it would only run into it again.
FAULTS = {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"}
UNCATCHABLE = {"SIGKILL", "SIGSTOP"}
SIGNALS = tuple(s for s in signal.Signals if s.name not in FAULTS | UNCATCHABLE)
P = ParamSpec("P")
T = TypeVar("T")


class _StandIn:
    """A handler's place holder. One that stays installed by accident does no harm: it passes everything on."""

    def __init__(self, signals: HeldSignals, handler: Handler) -> None:
        self.signals, self.handler = signals, handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signals.depth:
            self.signals.pending[signum] = (self.handler, frame)
        else:
            self.handler(signum, frame)


class HeldSignals:
    """A context for the main thread, to be entered again within itself; leaving the outermost one runs the handlers of
    the signals that came meanwhile. Signals without a Python handler act as ever.

    CPython looks for signals at calls, at function entry and at backward jumps, so nothing comes between the last
    statement of `__enter__` and the body, or before the first one of `__exit__` is done while signals are still held.
    """

    def __init__(self) -> None:
        self.depth = 0
        # Like the kernel: a signal that comes twice before it is handled counts once.
        self.pending: dict[int, tuple[Handler, FrameType | None]] = {}
        self._stand_ins: dict[int, _StandIn] = {}

    def __enter__(self) -> HeldSignals:
        if not self.depth:
            self._install()
        self.depth += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if not self.depth:
            try:
                self._uninstall()
            finally:
                self._run_pending()

    def deliver(self) -> None:
        """Runs the handlers of the signals that came meanwhile; what they raise, this raises."""
        if not self.pending:
            return
        depth, self.depth = self.depth, 0
        try:
            self._run_pending()
        finally:
            self.depth = depth
            self._install()  # a handler may have installed another one

    def _run_pending(self) -> None:
        if self.pending:
            signum, (handler, frame) = self.pending.popitem()
            try:
                handler(signum, frame)
            finally:
                self._run_pending()

    def _install(self) -> None:
        for signum in SIGNALS:
            handler = signal.getsignal(signum)
            if callable(handler) and not isinstance(handler, _StandIn):
                self._stand_ins[signum] = _StandIn(self, handler)
                signal.signal(signum, self._stand_ins[signum])

    def _uninstall(self) -> None:
        for signum, stand_in in list(self._stand_ins.items()):
            if signal.getsignal(signum) is stand_in:
                signal.signal(signum, stand_in.handler)
            del self._stand_ins[signum]


class _NothingHeld(HeldSignals):
    """What other threads get: no handler runs in them."""

    def __enter__(self) -> HeldSignals:
        return self

    def __exit__(self, *error: object) -> None:
        pass


_of_main_thread, _of_others = HeldSignals(), _NothingHeld()


def held_signals() -> HeldSignals:
    """The context in which no signal handler interrupts this thread."""
    return _of_main_thread if threading.current_thread() is threading.main_thread() else _of_others


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with signal handlers held back until it returns."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with held_signals():
            return function(*args, **kwargs)

    return wrapped
