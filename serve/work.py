"""Threads for what may take long, and room for the bodies of requests: both have a bound, and refuse beyond it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serve.protocol import unavailable

T = TypeVar("T")

THREADS = 4  # for tokenizing and rendering; the tokenizer works outside Python's lock
# For large bodies. Few: each may take seconds of a core and a hundred times its bytes of memory.
LARGE_THREADS = max(1, min(4, (os.cpu_count() or 1) // 4))
LARGE_NICENESS = 10  # not the lowest: while it holds Python's lock, others wait for it
PAUSE_SECONDS = 0.001  # between two reads of large bodies, which makes some 50 MB/s
MAX_PENDING = 4096  # calls that wait for a thread or run


class Workers:
    """Two sets of threads: large work waits behind large work only."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="serve")
        self._large = ThreadPoolExecutor(
            LARGE_THREADS, thread_name_prefix="serve-large", initializer=_lower_priority
        )
        self._pending = 0

    async def run(self, function: Callable[..., T], *args: Any, large: bool = False) -> T:
        """What the function returns or raises, on a thread. Raises APIError (503) if too many calls wait already."""
        if self._pending >= MAX_PENDING:
            raise unavailable(f"{self._pending} requests wait to be read: try again later", "server_busy")
        self._pending += 1
        pool = self._large if large else self._threads
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function, *args)
        finally:
            self._pending -= 1

    def close(self) -> None:
        for pool in (self._threads, self._large):
            pool.shutdown(wait=False, cancel_futures=True)


def _lower_priority() -> None:
    """Of this thread, where the system gives threads priorities of their own: the cores are for the steps first."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            niceness = max(LARGE_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


class Pace:
    """Turns at reading large bodies: one at a time, in the order of asking, and a pause behind each.

    Each read keeps the event loop for a part of a millisecond. Without turns, sixteen clients that send at once would
    take sixteen of them in every round of the loop, and the streams of others would wait. A turn is only the start of a
    read, so a client that sends slowly keeps nobody waiting.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()  # wakes its waiters in their order

    async def turn(self) -> None:
        async with self._lock:
            await asyncio.sleep(PAUSE_SECONDS)


class Room:
    """So many bytes for all bodies that are being read and prepared. Who comes first gets room first."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def reserved(self, size: int, timeout: float) -> AsyncIterator[None]:
        """Holds `size` bytes of the room, which has to wait until they are free.

        Raises APIError (503) after `timeout` seconds.
        """
        size = min(size, self._size)
        await self._take(size, timeout)
        try:
            yield
        finally:
            self._free += size
            self._wake()

    async def _take(self, size: int, timeout: float) -> None:
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._free += size  # the turn came together with the end of the wait
            with contextlib.suppress(ValueError):
                self._waiting.remove(entry)
            self._wake()
            if isinstance(error, TimeoutError):
                raise unavailable(
                    "the server is busy with other large requests: try again later", "server_busy", 5
                ) from None
            raise

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= size
                turn.set_result(None)
