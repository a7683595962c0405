"""Clients of a server around the fake engine: one over httpx, one that drives the app event by event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jinfer import EngineConfig, ServerConfig
from serve.app import create_app
from tests.support.fake_engine import REPLY, FakeAsyncEngine


class Client:
    """An HTTP client of the app, without sockets."""

    def __init__(self, engine: FakeAsyncEngine, **settings: Any) -> None:
        self.engine = engine
        self.config = ServerConfig(**settings)
        self.app, self.state = create_app(engine, self.config)  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)  # type: ignore[arg-type]
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """One request, with `body` as JSON if given; checks that no request is left in the engine."""

        async def run() -> httpx.Response:
            extra = {"json": body} if body is not None else {}
            response = await self.http.request(method, path, **extra, **options)
            assert self.engine.running == {}
            assert self.state.active == 0
            return response

        return asyncio.run(run())

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.call("POST", path, body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.call("GET", path, **options)

    def chat(self, text: str = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]} | fields)

    def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt} | fields)

    def fault(self, response: httpx.Response, status: int) -> dict[str, Any]:
        """The error object of a response, whose form is checked."""
        assert response.status_code == status, response.text
        assert response.headers["content-type"].startswith("application/json")
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return error


def read_events(data: bytes | str) -> list[Any]:
    """The events of a stream, which has to end with [DONE]; the last is left out."""
    text = data.decode() if isinstance(data, bytes) else data
    blocks = text.split("\n\n")
    assert blocks[-1] == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    events = [block.removeprefix("data: ") for block in blocks[:-1]]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


class Wire:
    """Drives the ASGI app event by event, for what httpx's transport hides: partial bodies, leaving in the middle."""

    def __init__(self, app: Any, path: str, body: Any = None, headers: Any = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), *(headers or [])],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        if body is not None:
            self.inbox.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.app = app

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.news.set()

    def start(self) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.app(self.scope, self.inbox.get, self.send))

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def data(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    async def until(self, text: bytes) -> None:
        """Waits until the body has `text` in it."""
        async with asyncio.timeout(10):
            while text not in self.data:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
def engine() -> FakeAsyncEngine:
    return FakeAsyncEngine()


@pytest.fixture
def client(engine: FakeAsyncEngine) -> Iterator[Client]:
    client = Client(engine)
    yield client
    client.state.close()


@pytest.fixture
def make_client() -> Any:
    """Client(engine, **server settings); a fresh engine unless one is given."""
    return lambda engine=None, **settings: Client(engine or FakeAsyncEngine(), **settings)


@pytest.fixture
def make_engine() -> Any:
    return lambda **config: FakeAsyncEngine(
        EngineConfig(**({"model": "fake", "max_model_len": 1000} | config))
    )


@pytest.fixture
def events() -> Any:
    return read_events


@pytest.fixture
def wire() -> Any:
    return Wire


@pytest.fixture
def reply() -> str:
    return REPLY
