"""A fake engine for the server's tests: the surface of AsyncEngine, answers known beforehand, faults on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers

from jinfer import (
    EngineConfig,
    EngineDeadError,
    FinishReason,
    OutputDelta,
    PoolingParams,
    QueueFullError,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)
from jinfer.request import RequestTimings
from jinfer.text import ChatTemplate, IncrementalDetokenizer, Tokenizer

REPLY = "Grüße, 世界! 🙂 The end."
TEMPLATE = (
    "{{ bos_token }}{% if tools %}[tools:{{ tools | length }}]{% endif %}{% if mood %}[{{ mood }}]{% endif %}"
    "{% if documents %}[documents:{{ documents | map(attribute='title') | join }}]{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """One token per byte, two merges, and special tokens behind them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "he", "ld"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("h", "e"), ("l", "d")])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


class FakeAsyncEngine:
    """Says REPLY to everything, one token a step. `running` stands for the pages: it must be empty in the end."""

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig(model="fake", max_model_len=1000)
        self.model_name = self.config.model
        self.max_model_len = self.config.max_model_len or 1000
        self.tokenizer = make_tokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.chat_template: ChatTemplate | None = ChatTemplate(
            {"default": TEMPLATE}, self.tokenizer.special_tokens
        )
        self.default_params: dict[str, Any] = {}
        self.default_pooling = PoolingParams()
        self.embedding_size = 4
        self.is_ready = True
        self.is_healthy = True
        self.stalled_seconds = 0.0
        self.error: str | None = None
        self.reply = self.tokenizer.encode(REPLY, add_special_tokens=False)
        self.running: dict[str, asyncio.Event] = {}  # request id -> abort flag
        self.seen: list[SimpleNamespace] = []
        self.step_seconds = 0.0
        self.tokens_per_step = 1
        self.hold_at: int | None = None  # waits here, in tokens, until released or aborted
        self.released = asyncio.Event()
        self.fail_at: int | None = None
        self.fail_request_at: int | None = None
        self.capacity = 10**6
        self.refusal: Exception | None = None  # what taking a request raises
        self.finished: dict[str, int] = {}
        self.draining = False

    async def wait_ready(self) -> None:
        while not self.is_ready:
            await asyncio.sleep(0.01)

    def validate(
        self, ids: Sequence[int], params: SamplingParams, *, prompt_only: bool = False
    ) -> Sequence[int]:
        if len(ids) >= self.max_model_len + prompt_only:
            raise RequestError(
                f"prompt has {len(ids)} tokens, max_model_len is {self.max_model_len}: shorten it",
                param="prompt",
            )
        for token in (*(params.logit_bias or ()), *params.stop_token_ids):
            if token >= self.vocab_size:
                raise RequestError(f"token id {token} is outside the vocabulary", param="logit_bias")
        return ids

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
        if self.draining or self.error:
            raise EngineDeadError(self.error or "shutting down")
        if self.refusal is not None:
            raise self.refusal
        if len(self.running) >= self.capacity:
            raise QueueFullError("the queue is full: try again later", retry_after=7)
        assert request_id not in self.running
        self.seen.append(
            SimpleNamespace(
                ids=list(prompt_token_ids),
                params=params,
                pooling=pooling,
                priority=priority,
                salt=cache_salt,
            )
        )
        aborted = self.running[request_id] = asyncio.Event()
        arrival = time.monotonic()
        try:
            await asyncio.sleep(0)
            if on_taken is not None:
                on_taken()
            writers = [
                _Writer(self, request_id, i, prompt_token_ids, params, arrival) for i in range(params.n)
            ]
            while writers:
                step = len(writers[0].ids)
                if self.fail_at is not None and step >= self.fail_at:
                    self.error, self.is_healthy, self.is_ready = "the engine failed: planted", False, False
                    raise EngineDeadError(self.error)
                if self.hold_at is not None and step >= self.hold_at and not self.released.is_set():
                    waits = [asyncio.ensure_future(e.wait()) for e in (self.released, aborted)]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for wait in waits:
                            wait.cancel()
                await asyncio.sleep(self.step_seconds)
                for writer in list(writers):
                    delta = writer.step(aborted.is_set())
                    if delta.finish_reason is not None:
                        self.finished[delta.finish_reason.value] = (
                            self.finished.get(delta.finish_reason.value, 0) + 1
                        )
                        writers.remove(writer)
                    if pooling is not None:
                        # The prompt's length, first and last token, and how it was pooled.
                        vector = [len(prompt_token_ids), prompt_token_ids[0], prompt_token_ids[-1]]
                        kind = len(pooling.pooling) * (1 if pooling.normalize else -1)
                        delta.embedding = np.asarray([*vector, kind], np.float32)
                        delta.token_ids, delta.text = [], ""
                    yield delta
        finally:
            del self.running[request_id]

    async def abort(self, request_id: str) -> None:
        self.running[request_id].set()

    async def drain(self, timeout: float) -> None:
        self.draining, self.is_ready = True, False
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.005)
        for flag in self.running.values():
            flag.set()

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_running=len(self.running),
            num_waiting=3,
            kv_cache_usage=0.25,
            prefix_cache_queries=100,
            prefix_cache_hits=40,
            prompt_tokens=1234,
            prompt_tokens_cached=321,
            generation_tokens=567,
            num_preemptions=2,
            recompiles=0,
            num_not_finite=1,
            step_tokens=SimpleNamespace(buckets=(1, 8), counts=(5, 2, 1), total=35),
            cache_config={"block_size": "8", "num_gpu_blocks": "64"},
            num_requests_finished=dict(self.finished),
            kv_fraction=0.5,
            kv_groups=(
                SimpleNamespace(window=None, num_layers=1, num_bytes=4096, usage=0.25),
                SimpleNamespace(window=16, num_layers=1, num_bytes=1024, usage=0.125),
            ),
        )

    def start(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class _Writer:
    """One choice: REPLY token by token, with log-probabilities that depend on the position alone."""

    def __init__(
        self,
        engine: FakeAsyncEngine,
        request_id: str,
        index: int,
        prompt: Sequence[int],
        params: SamplingParams,
        arrival: float,
    ) -> None:
        self.engine, self.request_id, self.index, self.params = engine, request_id, index, params
        self.prompt, self.arrival = list(prompt), arrival
        self.limit = min(params.max_tokens or 10**9, engine.max_model_len - len(prompt))
        self.ids: list[int] = []
        self.first_token: float | None = None
        self.text = IncrementalDetokenizer(
            engine.tokenizer,
            prompt,
            params.skip_special_tokens,
            params.stop,
            params.include_stop_str_in_output,
        )

    def step(self, aborted: bool) -> OutputDelta:
        eos = self.engine.tokenizer.eos_id
        assert eos is not None
        token_ids, text, logprobs, finish = [], "", [], None
        for _ in range(0 if aborted else self.engine.tokens_per_step):
            at = len(self.ids)
            token = self.engine.reply[at] if at < len(self.engine.reply) else eos
            if self.params.ignore_eos and token == eos:
                token = self.engine.reply[at % len(self.engine.reply)]
            self.ids.append(token)
            token_ids.append(token)
            logprobs.append(self.logprobs(token, at, self.params.logprobs or 0))
            if token == eos:
                finish = FinishReason.STOP
            else:
                text += self.text.push(token)
            if self.text.stopped_by is not None:
                finish = FinishReason.STOP
            elif finish is None and len(self.ids) >= self.limit:
                finish = FinishReason.LENGTH
            if finish is not None:
                break
        if aborted:
            finish = FinishReason.ABORT
        if self.engine.fail_request_at is not None and len(self.ids) > self.engine.fail_request_at:
            finish = FinishReason.ERROR
        if finish is not None:
            text += self.text.flush()
        self.first_token = self.first_token or time.monotonic()
        delta = OutputDelta(
            self.request_id,
            self.index,
            token_ids,
            text,
            logprobs if self.params.logprobs is not None else None,
            finish_reason=finish,
            stop_reason=self.text.stopped_by,
            num_prompt_tokens=len(self.prompt),
            num_cached_tokens=len(self.prompt) // 4,
        )
        if self.params.prompt_logprobs is not None and self.index == 0 and len(self.ids) == len(token_ids):
            count = self.params.prompt_logprobs
            delta.prompt_logprobs = [None] + [
                self.logprobs(t, i, count) for i, t in enumerate(self.prompt[1:], start=1)
            ]
        if finish is not None:
            delta.timings = RequestTimings(self.arrival, self.arrival, self.first_token, time.monotonic())
            delta.error = "a planted fault" if finish is FinishReason.ERROR else None
        return delta

    def logprobs(self, token: int, at: int, count: int) -> TokenLogprobs:
        """The token itself is the third most likely; the first has probability one half."""
        other = [i for i in range(count + 4) if i != token]
        top = [(other[0], -0.7), (other[1], -1.0), (token, -1.5 - at / 100), (other[2], float("-inf"))]
        top += [(i, float("-inf")) for i in other[3:]]
        ids, logprobs = zip(*top[:count]) if count else ((), ())
        return TokenLogprobs(token, -1.5 - at / 100, 3, ids, logprobs)
