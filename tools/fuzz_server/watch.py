"""What is looked at while requests run and after them: known answers, the event loop's pace, the engine's books."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import httpx

from tools.fuzz_server.server import cpu_seconds

CANARIES: tuple[dict[str, Any], ...] = (
    {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "return_token_ids": True},
    {"prompt": "The fox said", "max_tokens": 12, "seed": 5, "n": 2, "return_token_ids": True},
)
BUSY = (429, 503)
SETTLE_SECONDS = 60.0


class Watch:
    """Asks a server beside the requests that are being tried. `complaints` has what was wrong.

    pid: the server's process, if it is known; a stall then counts only as far as the server itself was at work in it,
    so that a busy machine is not taken for a busy event loop.
    """

    def __init__(self, url: str, pid: int | None = None) -> None:
        self._pid = pid
        # A connection of its own for each question, as a probe has: requests left open do not stand in its way.
        self._client = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False)
        self.complaints: list[str] = []
        self.canaries = 0
        self.slowest = 0.0  # seconds that GET /version took at most
        self._expected: list[Any] = []

    async def begin(self) -> dict[str, Any]:
        """Notes the canaries' answers; returns the server's openapi.json. Raises httpx.HTTPError."""
        document = await self._client.get("/openapi.json")
        document.raise_for_status()
        self._expected = [await self._ask(body) for body in CANARIES]
        if None in self._expected:
            raise RuntimeError(
                "the server does not answer a plain completion: it must be idle and serve text"
            )
        return document.json()

    async def close(self) -> None:
        await self._client.aclose()

    async def check_canaries(self, patient: bool = False) -> None:
        """Compares the canaries' tokens with the first ones. patient: a busy server is asked until it answers."""
        for body, expected in zip(CANARIES, self._expected, strict=True):
            end = time.monotonic() + SETTLE_SECONDS
            got = await self._ask(body)
            while got is None and patient and time.monotonic() < end:
                await asyncio.sleep(0.2)
                got = await self._ask(body)
            if got is None and not patient:
                continue
            self.canaries += 1
            if got != expected:
                self.complaints.append(f"canary {json.dumps(body)} gave {got}, at first {expected}")

    async def _ask(self, body: dict[str, Any]) -> Any:
        """The token ids of the choices; None while the server is busy."""
        response = await self._client.post("/v1/completions", json=body)
        if response.status_code in BUSY and "engine_dead" not in response.text:
            return None
        if response.status_code != 200:
            return f"status {response.status_code}: {response.text[:300]}"
        return [choice["token_ids"] for choice in response.json()["choices"]]

    async def tick(self) -> float:
        """Seconds that the server needs for its shortest answer."""
        begin, worked = time.monotonic(), self._cpu_seconds()
        with contextlib.suppress(httpx.HTTPError):
            await self._client.get("/version")
        seconds = time.monotonic() - begin
        if worked is not None:
            seconds = min(seconds, (self._cpu_seconds() or worked) - worked)
        self.slowest = max(self.slowest, seconds)
        return seconds

    def _cpu_seconds(self) -> float | None:
        return None if self._pid is None else cpu_seconds(self._pid)

    async def settle(self) -> None:
        """Waits until nothing runs; complains if the books do not come back to zero."""
        figures: dict[str, float] = {}
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            figures = await self._figures()
            if not any(figures.values()):
                break
            await asyncio.sleep(0.3)
        else:
            self.complaints.append(f"books after the last request: {figures}, all of which must be 0")
        health = await self._client.get("/health")
        if health.status_code != 200:
            self.complaints.append(f"GET /health says {health.status_code}: {health.text[:300]}")

    async def _figures(self) -> dict[str, float]:
        page = (await self._client.get("/metrics")).text
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "recompiles_total")
        found = {}
        for name in names:
            lines = re.findall(rf"^\w+:{name}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
            if not lines:
                raise RuntimeError(f"GET /metrics has no {name}")
            found[name] = max(map(float, lines))
        return found
