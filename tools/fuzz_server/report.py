"""Faults in words: what was sent, what came, how to send it again."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from tools.fuzz_server.cases import Case
from tools.fuzz_server.run import Address, Limits, Result, fault_alone, stall_alone
from tools.fuzz_server.shrink import shrunk
from tools.fuzz_server.watch import Watch

TRIES = 60  # shorter bodies that are tried for each fault
STALLS_EXPLAINED = 3
INLINE_BYTES = 2000  # a longer body is written to a file


async def explain_faults(address: Address, result: Result, limits: Limits) -> list[str]:
    """Each fault with a command that repeats it, its body made as short as it can be."""

    async def fails(case: Case) -> bool:
        return await fault_alone(address, case, limits) is not None

    found = []
    for fault in result.faults:
        case = await shrunk(fault.case, fails, TRIES)
        found.append(f"request {case.index} ({case.note}): {fault.complaint}\n  {repeat(case, address)}")
    return found


async def explain_stalls(address: Address, result: Result, limits: Limits, pid: int | None) -> list[str]:
    """The longest stalls, with the request that makes the same alone."""
    found = []
    for stall in sorted(result.stalls, key=lambda each: -each.seconds)[:STALLS_EXPLAINED]:
        worst, alone = 0.0, None
        for case in stall.cases:
            seconds = await stall_alone(address, case, limits, pid)
            if seconds > worst:
                worst, alone = seconds, case
        text = f"GET /version took {stall.seconds:.1f} s while {len(stall.cases)} requests ran"
        if alone is not None and worst > limits.stall / 4:
            text += f"; request {alone.index} ({alone.note}) alone makes it {worst:.1f} s\n  {repeat(alone, address)}"
        found.append(text)
    return found


def repeat(case: Case, address: Address) -> str:
    """A command line that sends the same request: with curl if the request is well formed, else byte by byte."""
    host, port = address
    url = f"http://{host}:{port}"
    is_plain = case.fields is not None and case.wire.endswith(b"\r\n\r\n" + case.body) and not case.cuts
    if not is_plain:
        file = _file(case, case.wire, ".http")
        return f"cat {file} | nc -q 5 {host} {port}"
    if len(case.body) <= INLINE_BYTES and case.body.isascii() and b"\x00" not in case.body:
        data = shlex.quote(case.body.decode())
    else:
        data = "@" + _file(case, case.body, ".json")
    headers = " ".join(
        "-H " + shlex.quote(f"{name.decode('latin-1')}: {value.decode('latin-1')}")
        for name, value in case.headers
        if name.lower() not in (b"host", b"connection")
    )
    return f"curl -sS -X {case.method.decode()} {shlex.quote(url + case.path)} {headers} --data-binary {data}"


def _file(case: Case, data: bytes, suffix: str) -> str:
    path = Path(tempfile.gettempdir()) / f"fuzz-server-{case.index}{suffix}"
    path.write_bytes(data)
    return str(path)


def figures(result: Result, watch: Watch, before: int | None, after: int | None) -> str:
    """One paragraph about a run."""
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(result.statuses.items()))
    text = (
        f"{result.requests} requests in {result.seconds:.0f} s ({counts}); {watch.canaries} canaries; "
        f"GET /version took {watch.slowest:.2f} s at most"
    )
    if before is not None and after is not None:
        text += f"; memory {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after"
    return text
