"""python -m tools.stall_check: hostile requests against a running server, and what its other clients see meanwhile.

Starts jinfer with the bundled model, or takes the server at --url. Steady streams run throughout, and GET /version is
asked every 20 ms. Each case is sent again and again for some seconds; the figures beside it are of a quiet time just
before. Exit status 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinfer import ConfigError
from tools.bench.server import started_server
from tools.stall_check.cases import CASES, Case
from tools.stall_check.sender import Sender
from tools.stall_check.watch import MIB, Watch, between, quantile
from tools.stall_check.wire import Target

SETTLE_SECONDS = 10.0  # after a case, for memory to come back
MIN_GAPS = 200  # fewer say nothing about one in a hundred


@dataclass(frozen=True)
class Limits:
    """What counts as a miss."""

    wait: float  # seconds for GET /version
    growth: float  # MiB while a case runs
    kept: float  # MiB of that which are still there SETTLE_SECONDS later
    ratio: float  # p99 of the streams' gaps, during to before


@dataclass(frozen=True)
class Result:
    """A case as others saw it. Seconds and MiB."""

    case: Case
    statuses: str
    seconds: float  # the longest answer
    wait: float
    growth: float
    kept: float
    before: float  # p99 of the streams' gaps
    during: float
    failures: int  # of the streams

    @property
    def ratio(self) -> float:
        return self.during / self.before

    def misses(self, limits: Limits) -> list[str]:
        found = []
        if not self.wait <= limits.wait:
            found.append(f"GET /version took {self.wait:.2f} s")
        if self.growth > limits.growth:
            found.append(f"memory grew by {self.growth:.0f} MiB")
        if self.kept > limits.kept:
            found.append(f"{self.kept:.0f} MiB stayed")
        if not self.ratio <= limits.ratio:
            found.append(f"streams' p99 rose {self.ratio:.1f}-fold")
        if (
            any(not "200" <= status <= "499" for status in self.statuses.split())
            and "503" not in self.statuses
        ):
            found.append(f"status {self.statuses}")
        if self.failures:
            found.append(f"{self.failures} streams failed")
        return found


async def check(target: Target, pid: int | None, options: argparse.Namespace) -> list[Result]:
    """Runs the cases one after the other. Prints a line of each."""
    watch = Watch(target, pid, options.streams, options.stream_tokens)
    sender, results = Sender(), []
    try:
        await asyncio.sleep(options.seconds)
        for case in CASES:
            if not options.case or any(word in case.name for word in options.case):
                result = await _run(case, target, sender, watch, options.seconds)
                watch.check()
                results.append(result)
                print(_line(result, options.limits), flush=True)
    finally:
        sender.close()
        await watch.close()
    return results


async def _run(case: Case, target: Target, sender: Sender, watch: Watch, seconds: float) -> Result:
    quiet = time.perf_counter()
    await asyncio.sleep(seconds)
    begin = time.perf_counter()
    failures, answers = watch.streams.failures, []
    gaps = watch.streams.gaps
    before = between(gaps, quiet, begin)
    while time.perf_counter() < begin + seconds or len(between(gaps, begin, time.perf_counter())) < MIN_GAPS:
        answers += await sender.send(target, case)
        if time.perf_counter() > begin + 20 * seconds:
            break
    end = time.perf_counter()
    await asyncio.sleep(0.1)
    memory = between(watch.memory.samples, quiet, begin)
    base = quantile(memory, 0.5) if memory else 0.0
    kept = await _settled(watch, base) if memory else 0.0
    return Result(
        case=case,
        statuses=" ".join(sorted({str(status) for status, _ in answers})),
        seconds=max(seconds for _, seconds in answers),
        wait=max(between(watch.prober.waits, begin, end + 0.1), default=float("inf")),
        growth=(max(between(watch.memory.samples, begin, end), default=base) - base) / MIB,
        kept=kept,
        before=quantile(before, 0.99),
        during=quantile(between(gaps, begin, end), 0.99),
        failures=watch.streams.failures - failures,
    )


async def _settled(watch: Watch, base: float) -> float:
    """MiB above `base` once memory has come back, or after SETTLE_SECONDS."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while (kept := (watch.memory.now() - base) / MIB) > 30 and time.perf_counter() < deadline:
        await asyncio.sleep(0.2)
    return kept


HEAD = f"{'request':26} {'status':8} {'answer':>8} {'/version':>9} {'memory':>8} {'kept':>8} {'ITL p99':>18} {'ratio':>6}"


def _line(result: Result, limits: Limits) -> str:
    misses = result.misses(limits)
    return (
        f"{result.case.name:26} {result.statuses:8} {result.seconds:6.2f} s {1e3 * result.wait:6.0f} ms "
        f"{result.growth:+5.0f} MiB {result.kept:+5.0f} MiB {1e3 * result.before:6.1f} -> {1e3 * result.during:5.1f} ms "
        f"{result.ratio:6.2f}" + (f"   MISS: {', '.join(misses)}" if misses else "")
    )


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    if options.url is not None:
        yield options.url, options.pid
    else:
        with started_server(options.model, None, options.server_args, options.api_key, 300) as (url, pid):
            yield url, pid


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.stall_check", description=__doc__)
    parser.add_argument("--url", help="a server that runs already; default: one is started")
    parser.add_argument("--pid", type=int, help="its process, to watch its memory")
    parser.add_argument("--api-key", help="the key it wants")
    parser.add_argument("--model", help="model of the server that is started; default: the bundled one")
    parser.add_argument("--server-args", default="", help="more of its flags, as on a command line")
    parser.add_argument("--case", action="append", help="only cases with this in their name; may be repeated")
    parser.add_argument("--streams", type=int, default=2, help="steady streams (2)")
    parser.add_argument(
        "--stream-tokens", type=int, default=900, help="tokens of each before it starts again (900)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each case is repeated (3)")
    parser.add_argument("--max-wait", type=float, default=0.3, help="most seconds for GET /version (0.3)")
    parser.add_argument("--max-growth", type=float, default=300.0, help="most MiB that memory grows (300)")
    parser.add_argument("--max-kept", type=float, default=100.0, help="most MiB that stay after a case (100)")
    parser.add_argument("--max-ratio", type=float, default=2.0, help="most growth of the streams' p99 (2)")
    options = parser.parse_args(argv)
    options.limits = Limits(options.max_wait, options.max_growth, options.max_kept, options.max_ratio)
    try:
        with _server(options) as (url, pid):
            print(HEAD)
            results = asyncio.run(check(Target(url, options.api_key), pid, options))
    except ConfigError as error:
        print(f"stall_check: error: {error}", file=sys.stderr)
        return 2
    missed = [result for result in results if result.misses(options.limits)]
    print(f"{len(results) - len(missed)} of {len(results)} cases within the limits")
    return 1 if missed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
