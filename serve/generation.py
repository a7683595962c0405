"""The engine's side of one HTTP request: starts its prompts, gathers their deltas, ends what is left over."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinfer import FinishReason, OutputDelta, PoolingParams, SamplingParams, TokenLogprobs
from serve.metrics import RequestClock
from serve.protocol import APIError
from serve.state import State

# Of a stream that is not read, in values (about a hundred bytes each); what comes beyond ends it.
MAX_READY = 1_000_000
DELTA_VALUES = 3  # what a delta costs beside its tokens


@dataclass(frozen=True)
class Job:
    """One HTTP request for the engine: one or more prompts with the same parameters."""

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    pooling: PoolingParams | None = None  # embeddings are wanted, and no text
    shows_cached: bool = False  # `usage` says how many prompt tokens were found in the prefix cache

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def values_per_token(self) -> int:
        """What an output token costs to keep and to show, in log-probabilities."""
        return 1 if self.params.logprobs is None else 2 + self.params.logprobs


def owned(job: Job, key: bytes, shows_cached: bool) -> Job:
    """The job as one of the client with this API key, b"" without one.

    Clients of different keys share no pages of the prefix cache, so neither the time of an answer nor `cached_tokens`
    reveals to one what another has sent. What was cached is shown only to those who share with nobody, unless
    `shows_cached` asks for it.
    """
    salt = f"{key.hex()}:{job.cache_salt}" if key else job.cache_salt
    return dataclasses.replace(job, cache_salt=salt, shows_cached=shows_cached or bool(salt))


class Generation:
    """Runs a Job. `next` gives every delta that is ready; `close` ends what still runs and must be called.

    A task per prompt takes the deltas off the engine at once, so a client that reads slowly holds no pages, and what
    came in the meantime goes out as one piece.
    """

    def __init__(self, state: State, job: Job, clock: RequestClock) -> None:
        self._state = state
        self._job = job
        self._clock = clock
        # Clients choose ids, and the engine needs each once: a retry may overlap with the request it repeats.
        self._group = f"{job.request_id}-{uuid.uuid4().hex[:12]}"
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: list[tuple[int, OutputDelta]] = []
        self._num_ready = 0  # values in it, see Job.values_per_token
        self._error: BaseException | None = None
        self._open = 0
        self._untaken = 0
        self._wake = asyncio.Event()
        self._taken = asyncio.Event()

    def start(self) -> None:
        """Hands every prompt to the engine. Its refusals come out of the first `next`."""
        for i, prompt in enumerate(self._job.prompts):
            request_id = f"{self._group}-{i}"
            self._tasks.append(asyncio.ensure_future(self._pump(i, prompt, request_id)))
        self._open = self._untaken = len(self._tasks)

    async def taken(self) -> None:
        """Returns once the engine has taken every prompt. Raises what it raised if it refused one."""
        await self._taken.wait()
        if self._error is not None and self._untaken:
            raise self._error

    async def wait(self, seconds: float) -> bool:
        """Waits until `next` has something to say; False if that takes longer than `seconds`."""
        if not self._has_news:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
        return self._has_news

    @property
    def _has_news(self) -> bool:
        return bool(self._ready) or self._error is not None or not self._open

    def _take_note(self) -> None:
        self._untaken -= 1
        if not self._untaken:
            self._taken.set()

    async def next(self) -> list[tuple[int, OutputDelta]] | None:
        """All (prompt index, delta) pairs that are ready, at least one; None after the last.

        Raises what the engine raised, or APIError for a delta that reports a fault.
        """
        while not self._has_news:
            self._wake.clear()
            await self._wake.wait()
        if not self._ready:
            if self._error is not None:
                raise self._error
            return None
        ready, self._ready, self._num_ready = self._ready, [], 0
        return ready

    async def close(self) -> None:
        """Ends the prompts that still run; their pages are free when it returns."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _drop(self, except_for: int) -> None:
        """Ends the other prompts, and lets go of what nobody has read: the reader may be a long time coming."""
        self._ready, self._num_ready = [], 0
        for index, task in enumerate(self._tasks):
            if index != except_for:
                task.cancel()

    async def _pump(self, index: int, prompt: Sequence[int], request_id: str) -> None:
        job = self._job
        try:
            stream: Any = self._state.engine.generate(
                prompt,
                job.params,
                request_id=request_id,
                pooling=job.pooling,
                priority=job.priority,
                cache_salt=job.cache_salt,
                group=self._group,
                on_taken=self._take_note,
            )
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    self._clock.observe(index, delta)
                    if delta.finish_reason is FinishReason.ERROR:
                        reason = delta.error or "unknown error"
                        raise APIError(500, f"the request failed: {reason}", code="request_failed")
                    self._ready.append((index, delta))
                    self._num_ready += DELTA_VALUES + len(delta.token_ids) * job.values_per_token
                    if self._num_ready > MAX_READY:
                        self._drop(except_for=index)
                        raise APIError(
                            503,
                            "the answer was not read while it was generated, and the server keeps no more of it: read "
                            "faster",
                            code="slow_reader",
                        )
                    self._wake.set()
        except Exception as error:
            # The first fault speaks for the request.
            self._error = self._error or error
            self._taken.set()
        finally:
            self._open -= 1
            self._wake.set()


@dataclass
class Choice:
    """What one choice of a whole (not streamed) answer has gathered."""

    _text: io.StringIO = field(default_factory=io.StringIO)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: Any = None  # float32[E] of an embedding request
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return self._text.getvalue()

    def add(self, delta: OutputDelta) -> None:
        if delta.text:
            self._text.write(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.embedding is not None:
            self.embedding = delta.embedding
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Choices:
    """The choices of a request by their index in the answer, and what they used."""

    def __init__(self, job: Job) -> None:
        self._n = job.params.n
        self._prompt_tokens = job.num_prompt_tokens
        self._shows_cached = job.shows_cached
        self._cached = [0] * len(job.prompts)
        self.generated = 0  # tokens, of all choices
        self.all = [Choice() for _ in range(len(job.prompts) * self._n)]

    def index(self, prompt: int, delta: OutputDelta) -> int:
        """A delta's choice index in the answer: the choices of the first prompt, then those of the second."""
        return prompt * self._n + delta.index

    def count(self, prompt: int, delta: OutputDelta) -> None:
        """Takes note of a delta's tokens and of how its choice ended."""
        self.generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.all[self.index(prompt, delta)].finish_reason = delta.finish_reason
        self._cached[prompt] = max(self._cached[prompt], delta.num_cached_tokens)

    def usage(self, generated: int | None = None) -> dict[str, Any]:
        """The `usage` object. Prompt tokens count once however many choices share them.

        Cached tokens are shown only where nobody else's prompts can be among them, see `owned`.
        """
        generated = self.generated if generated is None else generated
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)} if self._shows_cached else None,
        }


async def gather(generation: Generation, choices: Choices) -> None:
    """Runs a generation to its end, its output into `choices`. Raises as `Generation.next` does."""
    while (ready := await generation.next()) is not None:
        for prompt, delta in ready:
            choices.count(prompt, delta)
            choices.all[choices.index(prompt, delta)].add(delta)


def merged(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Deltas of one choice that were ready together, as one."""
    if len(deltas) == 1:
        return deltas[0]
    whole = Choice()
    for delta in deltas:
        whole.add(delta)
    last = deltas[-1]
    return OutputDelta(
        request_id=last.request_id,
        index=last.index,
        token_ids=whole.token_ids,
        text=whole.text,
        logprobs=whole.logprobs or None,
        prompt_logprobs=whole.prompt_logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
