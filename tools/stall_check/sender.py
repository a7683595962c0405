"""Sends the cases, from a process of its own: what it does must not delay those who watch.

It runs at the lowest priority. Senders are on other machines, as a rule, and take no time from the server's cores.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

from tools.stall_check.cases import CASES, Case
from tools.stall_check.wire import Target

BODY_BYTES = 4 * 1024 * 1024  # the largest body that a server takes by default
LOWEST_PRIORITY = 19


class Sender:
    """The process. `close` ends it."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(LOWEST_PRIORITY,)
        )

    async def send(self, target: Target, case: Case) -> list[tuple[int, float]]:
        """(status, seconds) of each request of a case, which are sent together."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _send_all, target, CASES.index(case))

    def close(self) -> None:
        self._pool.shutdown()


def _send_all(target: Target, number: int) -> list[tuple[int, float]]:
    return asyncio.run(_gather(target, number))


async def _gather(target: Target, number: int) -> list[tuple[int, float]]:
    case, body = CASES[number], _body(number)

    async def send() -> tuple[int, float]:
        start = time.perf_counter()
        status, _ = await target.call("POST", case.path, body)
        return status, time.perf_counter() - start

    return await asyncio.gather(*(send() for _ in range(case.at_once)))


@functools.lru_cache(maxsize=1)
def _body(number: int) -> bytes:
    return CASES[number].make_body(BODY_BYTES)
