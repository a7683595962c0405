"""The two ways to answer: whole, or streamed as server-sent events. Both end the work when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jinfer import FinishReason, OutputDelta
from serve.generation import Choices, Generation, Job, gather, merged
from serve.jsonpieces import parts, pieces
from serve.metrics import RequestClock
from serve.protocol import APIError, as_api_error, timed_out, unavailable
from serve.state import State

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx collects the events
}
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients pass over
QUICK_VALUES = (
    1000  # that an event or an answer may have to be written on the event loop: about a millisecond
)
FAREWELL_SECONDS = 1.0  # for the last words to a client that may have stopped reading


class WholeFormat(Protocol):
    """What an endpoint knows about its answers."""

    def whole(self, choices: Choices) -> dict[str, Any]:
        """The JSON body, for `pieces`: what may be long is made when its turn comes."""
        ...


class Format(WholeFormat, Protocol):
    """The same where answers may be streamed. Events are complete `data: ...` lines."""

    def events(self, choices: Choices, prompt: int, delta: OutputDelta) -> bytes: ...

    def closing_events(self, choices: Choices) -> bytes: ...


def event(content: Any) -> bytes:
    """One server-sent event. ASCII JSON: some clients take U+2028 and its like for the end of a line."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def long_event(content: Any) -> bytes:
    """`event` of what holds Long and Encoded values."""
    return b"data: " + "".join(parts(content, ascii=True)).encode() + b"\n\n"


@dataclass(frozen=True)
class Plan:
    """What a request asks for, ready to begin. kind: what it is, in the server's log."""

    job: Job
    form: Any  # WholeFormat, or Format where it streams
    kind: str
    streams: bool = False


async def send_json(state: State, value: Any, send: Send, headers: dict[str, str], quick: bool) -> None:
    """Sends a JSON body: its pieces are made on a thread (unless it is `quick`) while those before are on their way."""
    rest = pieces(value)

    async def following() -> bytes | None:
        return next(rest, None) if quick else await state.in_thread(next, rest, None)

    piece, after = await following(), await following()
    fields = {"content-type": "application/json", **headers}
    if after is None:
        fields["content-length"] = str(len(piece or b""))
    raw = [(name.encode(), text.encode()) for name, text in fields.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    while after is not None:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        piece, after = after, await following()
    await send({"type": "http.response.body", "body": piece or b"", "more_body": False})


class JSONAnswer(Response):
    """A body that is there already and may be long."""

    def __init__(self, state: State, value: Any) -> None:
        super().__init__()
        self._state, self._value = state, value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(self._state, self._value, send, {}, quick=False)


class Answer(Response):
    """Base: runs `produce` until it is done or the client has gone; then the work is cancelled and awaited."""

    def __init__(
        self,
        state: State,
        job: Job,
        form: WholeFormat,
        deadline: float,
        on_end: Callable[[Choices, str], None] | None = None,
    ) -> None:
        super().__init__()
        self._state = state
        self._job = job
        self._form = form
        self._deadline = deadline
        self._on_end = on_end
        self._generation = Generation(state, job, self._clock())
        self._id_header = {"x-request-id": job.request_id}

    def _clock(self) -> RequestClock:
        params = None if self._job.pooling is not None else self._job.params
        return RequestClock(self._state.metrics, params, self._state.engine.max_model_len)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._produce(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()  # an error before the answer began becomes an error body
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def _timeout(self) -> asyncio.Timeout:
        return asyncio.timeout(max(0.0, self._deadline - time.monotonic()))

    def _as_api_error(self, error: Exception) -> APIError:
        if isinstance(error, TimeoutError):
            return timed_out(self._state.config.request_timeout)
        if self._state.draining and not isinstance(error, APIError):
            # The engine takes nothing more; the request had slipped in behind the check.
            return _shutting_down()
        return as_api_error(error)


class WholeAnswer(Answer):
    """One JSON body, when everything is there."""

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        choices, outcome = Choices(self._job), "gone"
        try:
            async with self._timeout():
                self._generation.start()
                await gather(self._generation, choices)
            if self._state.draining and any(c.finish_reason is FinishReason.ABORT for c in choices.all):
                raise _shutting_down()  # half an answer would look like a whole one
            outcome = "done"
        except Exception as error:
            failure = self._as_api_error(error)
            outcome = failure.code or "failed"
            raise failure from error
        finally:
            await self._generation.close()
            if self._on_end:
                self._on_end(choices, outcome)
        job = self._job
        values = (job.num_prompt_tokens * job.params.n) + choices.generated * job.values_per_token
        quick = values <= QUICK_VALUES and job.pooling is None
        await send_json(self._state, self._form.whole(choices), send, self._id_header, quick)


class StreamedAnswer(Answer):
    """Server-sent events. The status is sent once the engine has taken the request, so a refusal has its own status;
    while nothing comes, a comment now and then says that the connection lives."""

    _form: Format

    async def _produce(self, scope: Scope, receive: Receive, send: Send) -> None:
        choices, outcome, began = Choices(self._job), "gone", False
        try:
            async with self._timeout():
                self._generation.start()
                await self._generation.taken()
                began = True
                await send(self._head())
                while (ready := await self._next(send)) is not None:
                    if data := await self._events(choices, ready):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                last = self._form.closing_events(choices)
                outcome = "done"
        except Exception as error:
            failure = self._as_api_error(error)
            outcome = failure.code or "failed"
            if not began:
                raise failure from error
            last = b"data: " + failure.body() + b"\n\n"
        finally:
            await self._generation.close()
            if self._on_end:
                self._on_end(choices, outcome)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS if outcome != "done" else None):
                await send({"type": "http.response.body", "body": last + DONE, "more_body": False})

    async def _next(self, send: Send) -> list[tuple[int, OutputDelta]] | None:
        """`Generation.next`, with a comment to the client after each silence."""
        seconds = self._state.config.stream_keep_alive
        while seconds and not await self._generation.wait(seconds):
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        return await self._generation.next()

    async def _events(self, choices: Choices, ready: Sequence[tuple[int, OutputDelta]]) -> bytes:
        values = sum(len(delta.token_ids) for _, delta in ready) * self._job.values_per_token
        if not choices.generated:  # the first events may carry the prompt
            values += self._job.num_prompt_tokens * self._job.params.n
        if values <= QUICK_VALUES:
            return self._encode(choices, ready)
        return await self._state.in_thread(self._encode, choices, ready)

    def _head(self) -> dict[str, Any]:
        headers = STREAM_HEADERS | self._id_header
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}

    def _encode(self, choices: Choices, ready: Sequence[tuple[int, OutputDelta]]) -> bytes:
        if len(ready) == 1:
            ((prompt, delta),) = ready
            choices.count(prompt, delta)
            return self._form.events(choices, prompt, delta)
        # One event per choice, whatever has gathered, in the order in which the choices came.
        by_choice: dict[tuple[int, int], list[OutputDelta]] = {}
        for prompt, delta in ready:
            choices.count(prompt, delta)
            by_choice.setdefault((prompt, delta.index), []).append(delta)
        return b"".join(
            self._form.events(choices, prompt, merged(deltas)) for (prompt, _), deltas in by_choice.items()
        )


def _shutting_down() -> APIError:
    return unavailable("the server is shutting down and could not finish the request", "shutting_down", 5)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
