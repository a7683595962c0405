"""Runs cases against one server, several at a time, and gathers what was wrong."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import httpx

from tools.fuzz_server.cases import Case, make_case
from tools.fuzz_server.client import Answer, exchange
from tools.fuzz_server.endpoints import read_endpoints
from tools.fuzz_server.verdict import judge
from tools.fuzz_server.watch import Watch

Address = tuple[str, int]  # host and port

TICK_SECONDS = 0.1
CANARY_SECONDS = 1.0
MAX_FAULTS = 20
SUSPECTS = 60  # cases that a dead server may have died of


@dataclass(frozen=True)
class Fault:
    """A case and what is wrong with its answer."""

    case: Case
    complaint: str


@dataclass(frozen=True)
class Stall:
    """A time in which the server's event loop did not answer, and the cases that were running."""

    seconds: float
    cases: tuple[Case, ...]


@dataclass
class Result:
    faults: list[Fault] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    seconds: float = 0.0
    is_dead: bool = False
    before_death: tuple[Case, ...] = ()  # the cases that began last, in their order
    last: Answer | None = None


@dataclass(frozen=True)
class Limits:
    """concurrency: cases at a time. timeout: seconds for one. stall: seconds that GET /version may take."""

    concurrency: int = 12
    timeout: float = 120.0
    stall: float = 2.0


async def fuzz(
    address: Address,
    seed: int,
    indexes: Iterable[int],
    limits: Limits,
    pid: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Result, Watch]:
    """Sends these requests of a seed; afterwards a server that stands gives its canaries' tokens and empty books.

    pid: the server's process, if it is known; see Watch. say: takes each fault when it is found.

    Raises:
      ValueError, RuntimeError, httpx.HTTPError: there is no server that could be tried.
    """
    watch = Watch(f"http://{address[0]}:{address[1]}", pid)
    try:
        endpoints = read_endpoints(await watch.begin())
        cases = (make_case(seed, index, endpoints) for index in indexes)
        result = await run_cases(address, cases, watch, limits, say)
        if not result.is_dead:
            await watch.check_canaries(patient=True)
            await watch.settle()
    finally:
        await watch.close()
    return result, watch


async def run_cases(
    address: tuple[str, int],
    cases: Iterable[Case],
    watch: Watch,
    limits: Limits,
    say: Callable[[str], None],
) -> Result:
    """Runs all cases, or until the server has died or shown MAX_FAULTS faults."""
    result, running = Result(), dict[int, Case]()
    begun: deque[Case] = deque(maxlen=SUSPECTS)
    begin, waiting = time.monotonic(), iter(cases)

    async def work() -> None:
        for case in waiting:
            running[case.index] = case
            begun.append(case)
            answer = await exchange(address, case, limits.timeout)
            if not result.is_dead:
                _note(result, case, answer, begun, say)
            del running[case.index]
            if result.is_dead or len(result.faults) >= MAX_FAULTS:
                return
            await asyncio.sleep(0)

    async def tick() -> None:
        while True:
            during = tuple(running.values())
            seconds = await watch.tick()
            if seconds > limits.stall:
                result.stalls.append(Stall(seconds, during))
            await asyncio.sleep(TICK_SECONDS)

    async def ask_canaries() -> None:
        while True:
            await asyncio.sleep(CANARY_SECONDS)
            with contextlib.suppress(httpx.HTTPError):  # a server that is gone shows in the cases
                await watch.check_canaries()

    beside = [asyncio.ensure_future(tick()), asyncio.ensure_future(ask_canaries())]
    try:
        await asyncio.gather(*(work() for _ in range(limits.concurrency)))
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    result.seconds = time.monotonic() - begin
    return result


def _note(
    result: Result, case: Case, answer: Answer, begun: Iterable[Case], say: Callable[[str], None]
) -> None:
    result.requests += 1
    result.statuses[str(answer.status) if answer.status else "left" if answer.left else "none"] += 1
    result.last = answer
    complaint = judge(case, answer)
    if complaint is None:
        return
    result.faults.append(Fault(case, complaint))
    say(f"request {case.index} ({case.note}): {complaint}")
    if "engine_dead" in complaint or "ConnectionRefused" in complaint or "Connect call failed" in complaint:
        result.is_dead = True
        result.before_death = tuple(begun)


async def fault_alone(address: Address, case: Case, limits: Limits) -> str | None:
    """The complaint about a case that runs with nothing beside it, a server that died of it included."""
    answer = await exchange(address, case, limits.timeout)
    complaint = judge(case, answer)
    if complaint is not None:
        return complaint
    watch = Watch(f"http://{address[0]}:{address[1]}")
    try:
        await watch.settle()
    except httpx.HTTPError as error:
        return f"afterwards the server does not answer: {error!r}"
    finally:
        await watch.close()
    return watch.complaints[0] if watch.complaints else None


async def stall_alone(address: Address, case: Case, limits: Limits, pid: int | None) -> float:
    """The longest time that the server does not answer while this case runs alone, in seconds."""
    watch = Watch(f"http://{address[0]}:{address[1]}", pid)
    running = asyncio.ensure_future(exchange(address, case, limits.timeout))
    try:
        while not running.done():
            await watch.tick()
            await asyncio.sleep(0.01)
        await watch.tick()
    finally:
        await running
        await watch.close()
    return watch.slowest
