"""The engine in a thread of its own, for asyncio callers: the server's side of the engine.

Commands reach the engine thread through one queue; deltas come back in one call per step and event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jinfer.config import EngineConfig
from jinfer.defaults import generation_defaults
from jinfer.engine import Engine
from jinfer.errors import EngineDeadError, JinferError, RequestError, RequestFailedError
from jinfer.models.decoder import Params
from jinfer.platform import own_settings
from jinfer.pooling import EMBED, OwnPooling, PoolingParams
from jinfer.request import OutputDelta
from jinfer.sampling.params import SamplingParams
from jinfer.stats import EngineStats
from jinfer.text import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)

IDLE_CHECK_SECONDS = 30.0  # an idle engine checks its books this often at most


@dataclass(eq=False)
class _Stream:
    """One running request as its asyncio caller sees it."""

    loop: asyncio.AbstractEventLoop
    open_choices: int
    items: asyncio.Queue[OutputDelta | BaseException] = field(default_factory=asyncio.Queue)

    def put(self, items: list[OutputDelta | BaseException]) -> None:
        for item in items:
            self.items.put_nowait(item)


class AsyncEngine:
    """Runs an `Engine` in a thread. `start()` returns at once; `wait_ready()` waits for load and compilation."""

    def __init__(self, config: EngineConfig) -> None:
        if config.max_seqs_per_request is None:
            config = dataclasses.replace(config, max_seqs_per_request=max(1, config.max_num_seqs // 4))
        self.config = config
        self.error: str | None = None
        self.default_params: dict[str, Any] = {}
        self._pooling: OwnPooling | None = None
        self._engine: Engine | None = None
        self._ready: Future[None] = Future()
        self._commands: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # touched by the engine thread only
        self._draining = False
        self._stopped = False
        self._closed = False  # the thread takes no more commands; changed under the lock
        self._closing = threading.Lock()
        self._busy_since: float | None = None  # when the thread last finished something, while it has work
        self._thread = threading.Thread(target=self._run, name="jinfer-engine", daemon=True)

    # Life

    def start(self) -> None:
        """Starts loading and compiling in the engine's thread."""
        self._thread.start()

    async def wait_ready(self) -> None:
        """Returns when requests can be served; raises what made the start fail."""
        await asyncio.shield(asyncio.wrap_future(self._ready))

    @property
    def is_ready(self) -> bool:
        engine = self._engine
        return engine is not None and engine.runner.has_weights and self.is_healthy and not self._draining

    @property
    def is_healthy(self) -> bool:
        return self.error is None and not self._stopped

    @property
    def stalled_seconds(self) -> float:
        """Seconds since a step ended last, or since work came, while there is work; 0 while idle, and while the engine
        loads, compiles or takes over weights.

        Reading it does not wait for the engine: it is how a step that never ends is noticed.
        """
        since, engine = self._busy_since, self._engine
        if since is None or engine is None or not self.is_healthy or engine.runner.is_preparing:
            return 0.0
        return max(time.monotonic() - max(since, engine.runner.prepared_time), 0.0)

    def shutdown(self) -> None:
        """Stops the engine's thread; running requests end with an error."""
        self._stopped = True
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    async def drain(self, timeout: float) -> None:
        """Accepts no more requests, gives the running ones `timeout` seconds, then aborts the rest."""
        self._draining = True
        if self._engine is None:
            return
        with contextlib.suppress(EngineDeadError):  # one that fails has ended its streams by itself
            await self._drain(asyncio.get_running_loop().time() + timeout)

    async def _drain(self, deadline: float) -> None:
        while await self._num_streams() and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

        def abort_all(engine: Engine) -> None:
            for request_id in list(self._streams):
                engine.abort(request_id)

        await self._call(abort_all)
        while await self._num_streams():
            await asyncio.sleep(0.01)

    async def _num_streams(self) -> int:
        return await self._call(lambda engine: len(self._streams)) if self.is_healthy else 0

    # Facts about the model; available once ready

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise EngineDeadError(self.error or "the engine is still loading: await wait_ready() first")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self.engine.chat_template

    @property
    def model_name(self) -> str:
        return self.config.model

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def weights_version(self) -> int:
        """Updates of the weights since the load; each delta says the version that made it."""
        return self.engine.weights_version

    @property
    def embedding_size(self) -> int:
        """Numbers in an embedding."""
        return self.engine.model_config.hidden_size

    @property
    def default_pooling(self) -> PoolingParams:
        """How embeddings are pooled where a request does not say; see `jinfer.pooling.default_pooling`.

        Raises:
          RequestError: the model's own pooling cannot be used, so that a request must say.
        """
        if self._pooling is None:
            raise EngineDeadError(self.error or "the engine is still loading: await wait_ready() first")
        return self._pooling.params()

    def stats(self) -> EngineStats:
        """A snapshot; reading it does not wait for the engine."""
        return self.engine.stats()

    # Requests

    def validate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, prompt_only: bool = False
    ) -> Sequence[int]:
        """The prompt, which `generate` does not check again; `prompt_only`: an embedding is wanted. For any thread.

        Raises:
          RequestError: a request with these could not run.
        """
        return self.engine.validate(prompt_token_ids, params, prompt_only=prompt_only)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        pooling: PoolingParams | None = None,
        priority: int = 0,
        cache_salt: str = "",
        group: str = "",
        on_taken: Callable[[], None] | None = None,
    ) -> AsyncIterator[OutputDelta]:
        """Deltas of all n choices as they come; ends when all are finished.

        pooling: the prompt's embedding is wanted, with the one delta that comes, and no text; see `embed`.

        group: requests of the same name count as one for `EngineConfig.max_seqs_per_request`.

        on_taken: called once the engine has taken the request, which may be long before the first delta.

        Closing the iterator aborts the request and frees its pages.

        Raises:
          RequestError, QueueFullError: the request was not taken. RequestFailedError: a fault in taking it; the engine
          goes on. EngineDeadError: the engine failed.
        """
        if self._draining:
            raise EngineDeadError("the engine is shutting down and takes no more requests")
        stream = _Stream(asyncio.get_running_loop(), params.n)
        open_choices = params.n

        def add(engine: Engine) -> None:
            if request_id in self._streams:
                raise RequestError(f"request id {request_id!r} is running already: choose another")
            try:
                engine.add_request(
                    request_id,
                    prompt_token_ids,
                    params,
                    pooling=pooling,
                    priority=priority,
                    cache_salt=cache_salt,
                    group=group,
                )
            except JinferError:
                raise
            except Exception as error:  # nothing of it stays, so the others go on
                problem = f"{type(error).__name__}: {error}"
                raise RequestFailedError(f"request {request_id!r} could not be taken ({problem})") from error
            self._streams[request_id] = stream

        try:
            await self._call(add)
            if on_taken is not None:
                on_taken()
            while open_choices:
                item = await stream.items.get()
                if isinstance(item, BaseException):
                    raise item
                open_choices -= item.finish_reason is not None
                yield item
        finally:
            if open_choices and self.is_healthy:
                # Not awaited: this also runs while the caller is being cancelled.
                self._commands.put(lambda engine: self._forget(engine, request_id, stream))

    async def embed(
        self,
        prompt_token_ids: Sequence[int],
        pooling: PoolingParams | None = None,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
    ) -> np.ndarray:
        """float32[hidden size]: one vector for a prompt; `pooling` defaults to `default_pooling`.

        It goes through the same steps as text that is generated, in chunks beside it. Raises as `generate` does.
        """
        pooling = pooling or self.default_pooling
        stream = self.generate(
            prompt_token_ids,
            EMBED,
            request_id=request_id,
            pooling=pooling,
            priority=priority,
            cache_salt=cache_salt,
        )
        async for delta in stream:
            if delta.error is not None:
                raise RequestFailedError(delta.error)
            if delta.embedding is not None:
                return delta.embedding
        raise RequestError(f"request {request_id!r} was aborted before its embedding was there")

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last delta with FinishReason.ABORT."""
        await self._call(lambda engine: engine.abort(request_id))

    async def update_weights(self, params: Params) -> None:
        """Swaps the weights between two steps; see `Engine.update_weights`."""
        await self._call(lambda engine: engine.update_weights(params))

    async def check_integrity(self) -> None:
        """Raises IntegrityError if the scheduler's books do not balance."""
        await self._call(lambda engine: engine.check_integrity())

    def _forget(self, engine: Engine, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:
            # Silently: the id may be in use again before the next step reports the ends.
            engine.abort(request_id, silent=True)
            del self._streams[request_id]

    async def _call(self, function: Callable[[Engine], Any]) -> Any:
        """Runs a function in the engine's thread and returns its result, or raises what it raised."""
        result: Future[Any] = Future()

        def command(engine: Engine) -> None:
            if not result.set_running_or_notify_cancel():
                return
            if self._closed:
                result.set_exception(EngineDeadError(self._why_dead()))
                return
            try:
                result.set_result(function(engine))
            except JinferError as error:
                result.set_exception(error)
            except BaseException as error:
                result.set_exception(EngineDeadError(f"the engine failed: {error}"))
                raise

        with self._closing:
            if not self.is_healthy:
                raise EngineDeadError(self._why_dead())
            self._commands.put(command)
        # If the caller is cancelled here, the command may still run: its own clean-up follows in the queue.
        return await asyncio.wrap_future(result)

    def _why_dead(self) -> str:
        return self.error or "the engine was shut down"

    # The engine's thread

    def _run(self) -> None:
        with own_settings():
            self._serve()

    def _serve(self) -> None:
        try:
            engine = Engine(self.config)
            self.default_params = generation_defaults(self.config.generation_config, engine.folder)
            self._pooling = OwnPooling(engine.folder)
            self._engine = engine
        except BaseException as error:
            self.error = f"the engine could not start: {error}"
            self._ready.set_exception(error)
            self._close(None)
            return
        self._ready.set_result(None)
        try:
            self._loop(engine)
            message = "the engine was shut down"
        except BaseException as error:
            logger.exception("the engine failed")
            self.error = message = f"the engine failed: {type(error).__name__}: {error}"
        self._end_all(engine, message)

    def _loop(self, engine: Engine) -> None:
        is_checked = True
        while True:
            try:
                while True:
                    # An idle engine sleeps here until a command comes.
                    busy = engine.has_unfinished
                    self._busy_since = time.monotonic() if busy else None
                    command = self._commands.get(
                        block=not busy, timeout=None if is_checked else IDLE_CHECK_SECONDS
                    )
                    if command is None:
                        return
                    self._busy_since = time.monotonic()
                    command(engine)
                    is_checked = False
            except queue.Empty:
                if not engine.has_unfinished:
                    engine.check_integrity()
                    is_checked = True
                    continue
            self._deliver(engine.step())

    def _deliver(self, deltas: list[OutputDelta]) -> None:
        ready: dict[str, list[OutputDelta]] = {}
        for delta in deltas:
            ready.setdefault(delta.request_id, []).append(delta)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, list[Any]]]] = {}
        for request_id, items in ready.items():
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            stream.open_choices -= sum(item.finish_reason is not None for item in items)
            if stream.open_choices <= 0:
                del self._streams[request_id]
            by_loop.setdefault(stream.loop, []).append((stream, items))
        for loop, entries in by_loop.items():
            _call_soon(loop, lambda entries=entries: [stream.put(items) for stream, items in entries])

    def _end_all(self, engine: Engine, message: str) -> None:
        self._stopped = True
        for stream in self._streams.values():
            error = EngineDeadError(message)
            _call_soon(stream.loop, lambda stream=stream, error=error: stream.put([error]))
        self._streams.clear()
        try:
            engine.fail_all(message)
        except Exception:
            logger.debug("after the failure the books could not be closed", exc_info=True)
        self._close(engine)

    def _close(self, engine: Engine | None) -> None:
        """Answers the commands that came too late: none may wait for ever, and none reaches a dead engine."""
        with self._closing:
            self._closed = True
            while True:
                try:
                    command = self._commands.get_nowait()
                except queue.Empty:
                    return
                if command is not None:
                    command(engine)  # type: ignore[arg-type]  # it looks at _closed first


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        logger.debug("the caller's event loop is closed: its deltas are dropped")
