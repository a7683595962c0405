"""The command line. See the package for what it does."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from tools.fuzz_server.cases import Case
from tools.fuzz_server.report import explain_faults, explain_stalls, figures, repeat
from tools.fuzz_server.run import Limits, Result, fault_alone, fuzz
from tools.fuzz_server.server import Server, memory, started
from tools.fuzz_server.shrink import shrunk

DEAD_TRIES = 12  # shorter bodies that are tried, each with a new server


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.fuzz_server",
        description="Sends mutated requests to a server; exit status 1 if it does not stand, with the request that "
        "repeats the fault.",
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="which requests; the same seed sends the same bytes")
    add("--requests", type=int, default=10_000, help="how many")
    add(
        "--only",
        type=int,
        default=None,
        metavar="INDEX",
        help="this one request of the seed, with its answer",
    )
    add("--url", default=None, help="a server that runs already; it is not restarted when it dies")
    add("--model", default="tiny", help="model of the server that is started")
    add("--concurrency", type=int, default=Limits.concurrency, help="requests at a time")
    add("--timeout", type=float, default=Limits.timeout, help="seconds for one request")
    add(
        "--stall-limit", type=float, default=Limits.stall, help="seconds that GET /version may take meanwhile"
    )
    add(
        "--memory-limit-mb",
        type=float,
        default=300.0,
        help="growth of the server's memory that is left afterwards",
    )
    add("--log", default=None, metavar="FILE", help="keep the server's log there")
    add("server_flags", nargs="*", help="more flags of the server that is started, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if the server stood, 1 if not, 2 if it could not be tried."""
    args = _arguments(argv)
    try:
        if args.url is not None:
            return asyncio.run(_try(args, None))
        with started(args.model, args.server_flags, args.log) as server:
            return asyncio.run(_try(args, server))
    except (RuntimeError, ValueError, httpx.HTTPError) as error:
        print(f"tools.fuzz_server: error: {error}", file=sys.stderr)
        return 2


async def _try(args: argparse.Namespace, server: Server | None) -> int:
    limits = Limits(args.concurrency, args.timeout, args.stall_limit)
    address = server.address if server is not None else _address(args.url)
    pid = server.process.pid if server is not None else None
    indexes = range(args.requests) if args.only is None else [args.only]
    before = memory(pid) if pid is not None else None
    result, watch = await fuzz(address, args.seed, indexes, limits, pid, lambda text: print(text, flush=True))
    after = memory(pid) if pid is not None and not result.is_dead else None
    if args.only is not None and result.last is not None:
        print(result.last.status, result.last.headers, result.last.body[:2000], result.last.error or "")
    print(figures(result, watch, before, after))
    problems = list(watch.complaints)
    if before is not None and after is not None and after - before > args.memory_limit_mb * 1e6:
        problems.append(f"the server's memory grew by {(after - before) / 1e6:.0f} MB")
    if not result.is_dead:
        problems += await explain_faults(address, result, limits)
        problems += await explain_stalls(address, result, limits, pid)
    elif server is None:
        last = [case.index for case in result.before_death]
        problems.append(f"the server died; its last requests, to be run one by one with --only: {last}")
    else:
        problems.append(await _explain_death(args, result, limits))
    if server is not None:
        problems += [f"traceback in the server's log: {line}" for line in server.tracebacks()[:5]]
        status = server.stop()
        if status != 0:
            problems.append(f"the server ended with status {status}")
    for problem in problems:
        print(f"FAULT (seed {args.seed}): {problem}")
    print("the server did not stand" if problems else "the server stood")
    return 1 if problems else 0


async def _explain_death(args: argparse.Namespace, result: Result, limits: Limits) -> str:
    """What the server died of: its last requests are sent to a new one, each when the one before has ended."""

    async def kills(case: Case) -> bool:
        with started(args.model, args.server_flags) as fresh:
            return await fault_alone(fresh.address, case, limits) is not None

    suspects = [case for case in result.before_death if case.body]
    print(f"the server died; its last {len(suspects)} requests go to a new one, one by one", flush=True)
    with started(args.model, args.server_flags) as fresh:
        for case in suspects:
            if await fault_alone(fresh.address, case, limits) is not None:
                break
        else:
            return f"the server died of none of its last requests alone: {[each.index for each in suspects]}"
    case = await shrunk(case, kills, DEAD_TRIES)
    return f"the server dies of request {case.index} ({case.note})\n  {repeat(case, ('127.0.0.1', 8000))}"


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"url is {url!r}, expected http://HOST:PORT")
    return parts.hostname, parts.port or 80


if __name__ == "__main__":
    sys.exit(main())
