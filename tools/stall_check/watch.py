"""What others see while a request is handled: the waits of probes, the gaps in streams, the server's memory."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from tools.stall_check.wire import Prober, Target

MIB = 2**20


class Streams:
    """Steady streams of short completions, each begun anew at its end.

    Attributes:
      gaps: (when, seconds) between two events of one stream.
      failures: streams that ended with another status than 200.
    """

    def __init__(self, target: Target, count: int, tokens: int) -> None:
        self._target, self._count, self._tokens = target, count, tokens
        self.gaps: list[tuple[float, float]] = []
        self.failures = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._stream(i) for i in range(self._count)))

    async def _stream(self, number: int) -> None:
        body = {
            "prompt": f"Stream {number}",
            "max_tokens": self._tokens,
            "min_tokens": self._tokens,
            "stream": True,
        }
        while True:
            last = math.nan

            def on_data(data: bytes) -> None:
                nonlocal last
                now = time.perf_counter()
                events = data.count(b"data: ")
                if not math.isnan(last):
                    self.gaps.extend([(now, (now - last) / events)] * events if events else [])
                last = now

            status, _ = await self._target.call("POST", "/v1/completions", json.dumps(body).encode(), on_data)
            self.failures += status != 200
            await asyncio.sleep(0 if status == 200 else 0.2)


class Memory:
    """Resident bytes of a process and its children, sampled. Linux only.

    Attributes:
      samples: (when, bytes).
    """

    def __init__(self, pid: int | None, every: float = 0.02) -> None:
        self._pid, self._every = pid, every
        self.samples: list[tuple[float, int]] = []

    async def run(self) -> None:
        while self._pid is not None:
            self.samples.append((time.perf_counter(), self.now()))
            await asyncio.sleep(self._every)

    def now(self) -> int:
        return sum(map(_resident, self._family()))

    def _family(self) -> list[int]:
        assert self._pid is not None
        found = [self._pid]
        for pid in found:
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
            except OSError:
                continue  # it has ended
        return found


def _resident(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Watch:
    """Everything that is watched at one server, until it is closed."""

    def __init__(self, target: Target, pid: int | None, streams: int, tokens: int) -> None:
        self.prober, self.streams, self.memory = Prober(target), Streams(target, streams, tokens), Memory(pid)
        self._tasks = [asyncio.ensure_future(each.run()) for each in (self.prober, self.streams, self.memory)]

    def check(self) -> None:
        """Raises what ended a watcher."""
        for task in self._tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def between(samples: Sequence[tuple[float, float]], begin: float, end: float) -> list[float]:
    """The values of the samples from `begin` to `end`."""
    return [value for when, value in samples if begin <= when <= end]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie; nan of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else math.nan
