"""A client that costs little: raw HTTP/1.1 over asyncio, nothing parsed but the status and the framing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Target:
    """A server's address and the key it wants."""

    url: str
    api_key: str | None = None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc}",
            f"Content-Length: {len(body)}",
        ]
        lines += ["Content-Type: application/json"] if body else []
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        return await asyncio.open_connection(parts.hostname, parts.port or 80, limit=2**20)

    async def call(
        self, method: str, path: str, body: bytes = b"", on_data: Callable[[bytes], None] | None = None
    ) -> tuple[int, int]:
        """One request over a connection of its own: (status, bytes of the answer); status 0 if there was none."""
        reader, writer = await self.connect()
        try:
            writer.write(self.request(method, path, body))
            return await _read_answer(reader, on_data)
        except (ConnectionError, asyncio.IncompleteReadError):
            return 0, 0
        finally:
            writer.close()


class Prober:
    """GET /version over one connection, again and again; each wait is timed from when the answer was due.

    Attributes:
      waits: (when, seconds) of each answer.
    """

    def __init__(self, target: Target, every: float = 0.02) -> None:
        self._target, self._every = target, every
        self.waits: list[tuple[float, float]] = []

    async def run(self) -> None:
        while True:
            reader, writer = await self._target.connect()
            try:
                while True:
                    start = time.perf_counter()
                    writer.write(self._target.request("GET", "/version"))
                    status, _ = await _read_answer(reader, None)
                    end = time.perf_counter()
                    self.waits.append((end, end - start if status == 200 else float("inf")))
                    await asyncio.sleep(self._every)
            except (ConnectionError, asyncio.IncompleteReadError):
                continue  # a connection may be closed between two requests
            finally:
                writer.close()


async def _read_answer(
    reader: asyncio.StreamReader, on_data: Callable[[bytes], None] | None
) -> tuple[int, int]:
    head = await reader.readuntil(b"\r\n\r\n")
    status, size = int(head[9:12]), 0
    fields = head.lower()
    if b"\r\ntransfer-encoding: chunked" in fields:
        while length := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            data = await reader.readexactly(length + 2)
            size += length
            if on_data is not None:
                on_data(data)
        await reader.readuntil(b"\r\n")
        return status, size
    length = int(fields.split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
    while size < length:
        data = await reader.read(min(2**16, length - size))
        if not data:
            raise ConnectionError("the answer was cut off")
        size += len(data)
        if on_data is not None:
            on_data(data)
    return status, size
