"""Load over HTTP on any OpenAI-compatible server: streamed requests, timed piece by piece."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from jinfer import ConfigError
from tools.bench.figures import RequestRecord, RunResult
from tools.bench.machine import CpuWatch
from tools.bench.settings import Load
from tools.bench.workload import BenchRequest, shortened

ERROR_LENGTH = 200  # characters of a server's error that are kept


@dataclass(frozen=True)
class Server:
    """A server and the model in it. pid: of its process, where it was started here and is one process."""

    url: str
    model: str
    version: str | None = None
    pid: int | None = None

    @property
    def name(self) -> str:
        return urlsplit(self.url).netloc


def base_url(url: str) -> str:
    """A server's address without the API's own path, however it was given."""
    return url.rstrip("/").removesuffix("/v1")


def find_server(url: str, model: str | None, api_key: str | None, pid: int | None = None) -> Server:
    """Asks a server what it serves.

    Raises:
      ConfigError: it cannot be reached, does not list models, or does not have the one that was named.
    """
    url = base_url(url)
    try:
        with httpx.Client(headers=_headers(api_key), timeout=30, trust_env=False) as client:
            response = client.get(f"{url}/v1/models")
            response.raise_for_status()
            names = [entry["id"] for entry in response.json()["data"]]
            version = _version(client, url)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"no OpenAI-compatible server at {url}: GET /v1/models failed ({_short(error)}). "
            "Start it, or correct the URL"
        ) from error
    if not names or (model is not None and model not in names):
        raise ConfigError(f"{url} serves {', '.join(map(repr, names)) or 'no model'}, asked for {model!r}")
    return Server(url, model or names[0], version, pid)


def _version(client: httpx.Client, url: str) -> str | None:
    """What jinfer and vLLM say at /version; others have no such path."""
    try:
        found = client.get(f"{url}/version").json()
        return str(found["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class HTTPSystem:
    """One server under the load that was asked for."""

    def __init__(self, server: Server, load: Load, name: str) -> None:
        self.server, self.load, self.name = server, load, name

    def warm_up(self, requests: Sequence[BenchRequest]) -> None:
        self._checked(asyncio.run(self._run(shortened(list(requests)))))

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        # A server that was started elsewhere counts as "others", which would say nothing.
        watch = CpuWatch([self.server.pid]) if self.server.pid is not None else None
        records = asyncio.run(self._run(requests))
        return RunResult(self._checked(records), others_cpu=watch.others() if watch else None)

    def _checked(self, records: list[RequestRecord]) -> list[RequestRecord]:
        if all(record.error is not None for record in records):
            raise ConfigError(f"{self.server.url}: every request failed; the first: {records[0].error}")
        return records

    async def _run(self, requests: Sequence[BenchRequest]) -> list[RequestRecord]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.load.request_timeout)
        async with httpx.AsyncClient(
            headers=_headers(self.load.api_key), limits=limits, timeout=timeout, trust_env=False
        ) as client:
            if self.load.concurrency is not None:
                return await self._closed_loop(client, requests, self.load.concurrency)
            begin = time.perf_counter()
            return list(await asyncio.gather(*(self._arrive(client, r, begin) for r in requests)))

    async def _arrive(self, client: httpx.AsyncClient, request: BenchRequest, begin: float) -> RequestRecord:
        # Timed from when it should have been sent: a client that lags must not flatter the server.
        due = begin + request.arrival
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await self._send(client, request, due)

    async def _closed_loop(
        self, client: httpx.AsyncClient, requests: Sequence[BenchRequest], concurrency: int
    ) -> list[RequestRecord]:
        waiting, records = deque(requests), []

        async def worker() -> None:
            while waiting:
                request = waiting.popleft()
                records.append(await self._send(client, request, time.perf_counter()))

        await asyncio.gather(*(worker() for _ in range(min(concurrency, len(requests)))))
        return records

    async def _send(self, client: httpx.AsyncClient, request: BenchRequest, start: float) -> RequestRecord:
        record = RequestRecord(request.index, start)
        chat = self.load.endpoint == "chat"
        path = "/v1/chat/completions" if chat else "/v1/completions"
        try:
            async with asyncio.timeout(self.load.request_timeout):
                async with client.stream(
                    "POST", self.server.url + path, json=self._body(request)
                ) as response:
                    if response.status_code != 200:
                        text = (await response.aread()).decode("utf-8", "replace")
                        record.error = f"status {response.status_code}: {text[:ERROR_LENGTH]}"
                    else:
                        await _read(response, record)
        except TimeoutError:
            record.error = f"no end after {self.load.request_timeout:g} s"
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            record.error = _short(error)
        self._finish(record, request)
        return record

    def _body(self, request: BenchRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.server.model,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.load.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        if self.load.ignore_eos:
            body["ignore_eos"] = True
        return body

    def _finish(self, record: RequestRecord, request: BenchRequest) -> None:
        if record.error is not None:
            return
        if not record.token_times:
            record.error = "the server sent no output"
            return
        record.end = max(record.end, record.token_times[-1])
        record.output_tokens = record.output_tokens or len(record.token_times)
        if not record.prompt_tokens:
            words = request.prompt.split() if isinstance(request.prompt, str) else request.prompt
            record.prompt_tokens = len(words)
        if self.load.ignore_eos and record.output_tokens < request.max_tokens:
            record.error = f"ended early: {record.output_tokens} of {request.max_tokens} tokens"


async def _read(response: httpx.Response, record: RequestRecord) -> None:
    """Takes the stream's events into the record; raises ValueError or KeyError for what is no such stream."""
    async for data, now in _events(response):
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if chunk.get("error"):
            error = chunk["error"]
            message = error.get("message", error) if isinstance(error, dict) else error
            record.error = f"error in the stream: {str(message)[:ERROR_LENGTH]}"
            return
        for choice in chunk.get("choices") or ():
            if _has_output(choice):
                record.token_times.append(now)
            if choice.get("finish_reason"):
                record.end = now
        if usage := chunk.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens") or 0
            record.output_tokens = usage.get("completion_tokens") or 0
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _has_output(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    parts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
    return any(parts)


async def _events(response: httpx.Response) -> AsyncIterator[tuple[bytes, float]]:
    """The data of each event and when it came in."""
    rest = b""
    async for block in response.aiter_bytes():
        now = time.perf_counter()
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip(), now


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:ERROR_LENGTH]
