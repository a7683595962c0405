"""A crowd of connections that ask for nothing, and what it does to those who ask for something."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from jinfer import ConfigError
from tools.bench.settings import Crowd

CONNECT_SECONDS = 10.0
PARTIAL = b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Half: "
WHOLE = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"


def run_connections(crowd: Crowd, say: Callable[[str], None]) -> tuple[str, bool]:
    """Opens the crowd and probes the server before, beside and after it. Returns the report, and whether every probe
    was answered and every silent connection closed in time."""
    from tools.bench.server import started_server

    _allow_files(crowd.idle + crowd.half_open)
    with ExitStack() as stack:
        url, pid = crowd.url, None
        if url is None:
            say("starting jinfer.serve with the bundled model")
            url, pid = stack.enter_context(started_server(None, None, crowd.server_args, None, 600.0))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=crowd.patience, trust_env=False))
        rows = [_probe("before", client, crowd, pid)]
        sockets: list[socket.socket] = []
        stack.callback(lambda: [each.close() for each in sockets])
        start = time.monotonic()
        address = _address(url)
        for data, count in ((WHOLE, crowd.idle), (PARTIAL, crowd.half_open)):
            sockets += [_open(address, data) for _ in range(count)]
        opened = time.monotonic() - start
        # They are opened as fast as this process can. Whoever comes then waits until they have been taken in.
        client.get("/version", headers={"connection": "close"})
        first = time.monotonic() - start - opened
        rows.append(_probe("beside them", client, crowd, pid))
        closed, seconds = _wait_closed(sockets, crowd.patience)
        rows.append(_probe("after them", client, crowd, pid))
    left = len(sockets) - closed
    text = "\n".join(
        [
            f"{crowd.idle} idle and {crowd.half_open} half-open connections",
            f"{'':12} {'probes failed':>14} {'median ms':>10} {'worst ms':>9} {'completion ms':>14} {'RSS MiB':>8}",
            *rows_text(rows),
            f"opened in {opened:.1f} s; the next request was answered {first * 1000:.0f} ms after the last of them",
            f"closed by the server: {closed} of {len(sockets)}, the last {seconds:.1f} s after all were open",
        ]
    )
    return text, left == 0 and not any(row[1] for row in rows)


Row = tuple[str, int, float, float, float, float | None]


def rows_text(rows: list[Row]) -> list[str]:
    return [
        f"{name:12} {failed:14} {median:10.1f} {worst:9.1f} {completion:14.1f} "
        + (f"{memory:8.0f}" if memory is not None else f"{'-':>8}")
        for name, failed, median, worst, completion, memory in rows
    ]


def _probe(name: str, client: httpx.Client, crowd: Crowd, pid: int | None) -> Row:
    """GET /version on a new connection each time, and completions of 16 tokens; milliseconds."""
    times, completions, failed = [], [], 0
    requests = [("GET", "/version", None, times)] * crowd.probes
    body = {"prompt": "Once", "max_tokens": 16, "temperature": 0}
    requests += [("POST", "/v1/completions", body, completions)] * max(1, crowd.probes // 10)
    for method, path, content, found in requests:
        start = time.monotonic()
        try:
            client.request(method, path, json=content, headers={"connection": "close"}).raise_for_status()
            found.append((time.monotonic() - start) * 1000)
        except httpx.HTTPError:
            failed += 1
    nothing = [float("nan")]
    return (
        name,
        failed,
        statistics.median(times or nothing),
        max(times or nothing),
        statistics.median(completions or nothing),
        _memory(pid),
    )


def _open(address: tuple[str, int], data: bytes) -> socket.socket:
    """A connection that has sent `data`, and has its answer if that was a whole request."""
    sock = socket.create_connection(address, timeout=CONNECT_SECONDS)
    sock.sendall(data)
    if data is WHOLE:
        sock.recv(4096)
    return sock


def _wait_closed(sockets: list[socket.socket], patience: float) -> tuple[int, float]:
    """How many of them the server closes within `patience` seconds, and when it closed the last."""
    start = last = time.monotonic()
    closed = 0
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ)
        while closed < len(sockets) and time.monotonic() - start < patience:
            for key, _ in selector.select(timeout=1.0):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                with contextlib.suppress(BlockingIOError):
                    try:
                        ended = not sock.recv(4096)
                    except ConnectionError:
                        ended = True
                    if ended:
                        selector.unregister(sock)
                        closed, last = closed + 1, time.monotonic()
    return closed, last - start


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "localhost", parts.port or 80


def _memory(pid: int | None) -> float | None:
    """MiB that the process has in memory; None where that cannot be read."""
    if pid is not None:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) / 1024
    return None


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 64
    if soft != resource.RLIM_INFINITY and soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"{count} connections need {needed} open files, and {hard} are allowed: raise ulimit -n"
            ) from error
