"""`LLM`: offline batches in a few lines."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jinfer.arguments import read_chats, read_params, read_priorities
from jinfer.config import EngineConfig
from jinfer.defaults import generation_defaults
from jinfer.engine import Engine
from jinfer.errors import RequestError, RequestFailedError
from jinfer.interrupts import HeldSignals, held_signals
from jinfer.models.decoder import Params
from jinfer.platform import own_settings
from jinfer.pooling import EMBED, OwnPooling, PoolingParams
from jinfer.prompts import Prompt, read_prompts
from jinfer.request import Completion, EmbeddingOutput, OutputDelta, RequestOutput, ScoreOutput
from jinfer.sampling.params import SamplingParams
from jinfer.scoring import join_pair, score_of
from jinfer.text.chat import OPTIONS

Message = Mapping[str, Any]
OneParams = SamplingParams | Mapping[str, Any]
ParamsLike = OneParams | Iterable[OneParams] | None
TEMPLATE_OPTIONS = (*OPTIONS, "chat_template_kwargs", "allow_special_tokens")
PROGRESS_FROM = 8  # shorter batches show no bar
SIGNAL_SECONDS = 0.1  # a call that waits for another thread's looks this often whether it was interrupted

_numbers = itertools.count()


class LLM:
    """One model, ready to answer batches.

    Threads may share it: their calls wait for each other. A call from within a running one, as a signal handler could
    make it, is refused. Ctrl-C, or whatever else a signal handler raises, ends a batch between two steps: nothing of it
    is returned, and the next call finds an idle engine.

    Args:
      model: folder, hub id, or the bundled model's name.
      options: any other field of `EngineConfig`, for instance max_model_len=2048 or tensor_parallel_size=2.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        if model is not None:
            options["model"] = model
        with own_settings():
            self.engine = Engine(EngineConfig(**options))
        self._defaults = generation_defaults(self.engine.config.generation_config, self.engine.folder)
        self._own_pooling = OwnPooling(self.engine.folder)
        self._lock = threading.RLock()  # held by the call that uses the engine
        self._in_use = False  # changed by the holder of the lock
        self._left_over: list[str] = []  # requests of a batch that is running, or whose end was cut off

    @property
    def tokenizer(self):
        return self.engine.tokenizer

    @property
    def weights_version(self) -> int:
        """Updates of the weights since the load; each result says the version that made it."""
        return self.engine.weights_version

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` and `chat` use where they are given none: the model's generation_config.json, as the option
        `generation_config` says."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsLike = None,
        *,
        priority: Iterable[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; results come in the prompts' order.

        Args:
          prompts: one or a list: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
          sampling_params: one for all, or one per prompt, each `SamplingParams` or a mapping of its fields; default:
            `get_default_sampling_params()`.
          priority: one per prompt; lower runs first under scheduling_policy="priority".
          use_tqdm: show a progress bar on batches of eight and more.

        Raises:
          RequestError: a prompt or parameter is refused; nothing of the batch has run then.
        """
        token_ids, texts = self._read(prompts)
        params = read_params(sampling_params, len(token_ids), self.get_default_sampling_params)
        results = self._run(token_ids, texts, params, priority=priority, use_tqdm=use_tqdm)
        return [result.output() for result in results]

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: ParamsLike = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several at once.

        Args:
          messages: a list of {"role": ..., "content": ...}, or a list of such lists.
          template_options: for the chat template: tools, documents, add_generation_prompt, continue_final_message,
            chat_template_kwargs; see `ChatTemplate.render`. With allow_special_tokens=True the text of a special token
            in a message becomes that token; else it stays text.

        Raises:
          RequestError: the model has no chat template, or a conversation is malformed.
        """
        template = self.engine.chat_template
        if template is None:
            raise RequestError(f"{self.engine.config.model} has no chat template: use generate()")
        for name in template_options.keys() - set(TEMPLATE_OPTIONS):
            raise RequestError(f"chat has no option {name!r}, expected one of {', '.join(TEMPLATE_OPTIONS)}")
        chats = read_chats(messages)
        made = [template.tokens(self.tokenizer, chat, **template_options) for chat in chats]
        token_ids, texts = [ids for ids, _ in made], [text for _, text in made]
        params = read_params(sampling_params, len(texts), self.get_default_sampling_params)
        results = self._run(token_ids, texts, params, use_tqdm=use_tqdm)
        return [result.output() for result in results]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """One vector per prompt, from the hidden states after the final norm; in the prompts' order.

        Args:
          pooling: "last": of the last token; "mean": their mean over all tokens.
          normalize: scale each vector to length 1. Both default to what a sentence-transformers folder says, else to
            "last" and True.

        Raises:
          RequestError: a prompt or parameter is refused; nothing of the batch has run then.
        """
        token_ids, texts = self._read(prompts)
        params = self._pooling(pooling, normalize)
        results = self._run(
            token_ids, texts, [EMBED] * len(texts), pooling=params, use_tqdm=use_tqdm, unit="prompt"
        )
        return [result.embedded() for result in results]

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[ScoreOutput]:
        """Log-likelihoods of continuations given their prompts; one per continuation, in order.

        Args:
          prompts: one for all continuations, or one per continuation.
          continuations: text or token ids. A token across the seam of two texts counts for the continuation. None:
            every prompt is scored from its second token on.

        Raises:
          RequestError: a prompt or continuation is refused; nothing of the batch has run then.
        """
        if continuations is None:
            wholes, _ = self._read(prompts)
            starts = [1] * len(wholes)
            for whole in wholes:
                if len(whole) < 2:
                    raise RequestError("a text to be scored has fewer than two tokens: give a longer one")
        else:
            heads, tails = read_prompts(prompts), read_prompts(continuations, "continuations")
            if len(heads) == 1:
                heads *= len(tails)
            if len(heads) != len(tails):
                raise RequestError(
                    f"{len(heads)} prompts for {len(tails)} continuations: give one prompt, or one per continuation"
                )
            pairs = [join_pair(self.tokenizer, *pair) for pair in zip(heads, tails, strict=True)]
            wholes, starts = [whole for whole, _ in pairs], [start for _, start in pairs]
        params = [SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)] * len(wholes)
        results = self._run(wholes, [None] * len(wholes), params, prompt_only=True, use_tqdm=use_tqdm)
        for result in results:
            result.check()
        return [score_of(result.output(), start) for result, start in zip(results, starts, strict=True)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens of the model's convention included."""
        return self.tokenizer.encode(text)

    def update_weights(self, params: Params) -> None:
        """Swaps the weights in place, without recompiling; see `Engine.update_weights`."""
        with own_settings(), held_signals() as signals, self._turn(signals):
            self.engine.update_weights(params)

    def _read(self, prompts: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], list[str | None]]:
        """Token ids and, where it was given, the text of each prompt."""
        many = read_prompts(prompts)
        token_ids = [self.encode(p) if isinstance(p, str) else p for p in many]
        return token_ids, [p if isinstance(p, str) else None for p in many]

    def _pooling(self, pooling: str | None, normalize: bool | None) -> PoolingParams:
        if pooling is not None and normalize is not None:
            return PoolingParams(pooling, normalize)
        own = self._own_pooling.params() if pooling is None else PoolingParams(pooling)
        return own if normalize is None else PoolingParams(own.pooling, normalize)

    def _run(
        self,
        prompts: list[list[int]],
        texts: Sequence[str | None],
        params: list[SamplingParams],
        *,
        pooling: PoolingParams | None = None,
        prompt_only: bool = False,
        priority: Iterable[int] | None = None,
        use_tqdm: bool = True,
        unit: str = "request",
    ) -> list[_Result]:
        prompt_only |= pooling is not None
        self._check(prompts, params, prompt_only)
        priorities = read_priorities(priority, len(prompts))
        ids = [f"llm-{next(_numbers)}" for _ in prompts]
        results = {
            request_id: _Result(request_id, text, prompt, p.n)
            for request_id, text, prompt, p in zip(ids, texts, prompts, params, strict=True)
        }
        waiting = list(zip(ids, prompts, params, priorities, strict=True))[::-1]
        shown = use_tqdm and len(ids) >= PROGRESS_FROM
        with own_settings(), held_signals() as signals, self._turn(signals):
            self._abandon()
            self._left_over = ids
            try:
                with _progress(len(ids), unit, shown) as advance:
                    self._feed(waiting, pooling, prompt_only)
                    while self.engine.has_unfinished:
                        for delta in self.engine.step():
                            if delta.request_id in results and results[delta.request_id].add(delta):
                                advance()
                        signals.deliver()
                        self._feed(waiting, pooling, prompt_only)
            finally:
                self._abandon()
        return [results[request_id] for request_id in ids]

    @contextlib.contextmanager
    def _turn(self, signals: HeldSignals) -> Iterator[None]:
        """The engine, for the caller alone; waits for the other threads' calls.

        Raises:
          RequestError: this thread is in the middle of another call.
        """
        while not self._lock.acquire(timeout=SIGNAL_SECONDS):
            signals.deliver()
        try:
            if self._in_use:
                raise RequestError(
                    "this LLM is in the middle of another call of the same thread: call it when that one has returned, "
                    "and not from a signal handler or callback"
                )
            self._in_use = True
            try:
                yield
            finally:
                self._in_use = False
        finally:
            self._lock.release()

    def _abandon(self) -> None:
        """Ends what is left of a batch, so that the engine can go on."""
        if not self._left_over:
            return
        for request_id in self._left_over:
            self.engine.abort(request_id)
        try:
            for _ in self.engine.drain():
                pass
        except Exception:
            self.engine.fail_all("its batch has failed")
        self._left_over = []

    def _check(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        prompt_only: bool,
    ) -> None:
        limit = self.engine.config.max_num_waiting
        for prompt, p in zip(prompts, params, strict=True):
            self.engine.validate(prompt, p, prompt_only=prompt_only)
            if p.n > limit:
                raise RequestError(
                    f"n is {p.n} and the queue holds max_num_waiting={limit}: lower n or raise that",
                    param="n",
                )

    def _feed(
        self,
        waiting: list[tuple[str, list[int], SamplingParams, int]],
        pooling: PoolingParams | None,
        prompt_only: bool,
    ) -> None:
        """Hands over as many requests as the engine's queue takes."""
        limit = self.engine.config.max_num_waiting
        while waiting and self.engine.scheduler.num_waiting + waiting[-1][2].n <= limit:
            request_id, prompt, params, priority = waiting.pop()
            self.engine.add_request(
                request_id, prompt, params, pooling=pooling, prompt_only=prompt_only, priority=priority
            )


@contextlib.contextmanager
def _progress(total: int, unit: str, shown: bool) -> Iterator[Callable[[], None]]:
    """Yields what moves a progress bar by one.

    The bar ends with the block and not with the frames that know it: Python drops what a signal handler raises
    within a finalizer, and a bar has one.
    """
    if not shown:
        yield lambda: None
        return
    bar = tqdm(total=total, unit=unit)

    def advance() -> None:
        bar.update()

    try:
        yield advance
    finally:
        bar.close()
        del bar


class _Result:
    """A request's deltas, put together."""

    def __init__(self, request_id: str, prompt: str | None, token_ids: list[int], n: int) -> None:
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, token_ids
        self.prompt_logprobs: Any = None
        self.embedding: np.ndarray | None = None
        self.num_cached = 0
        self.weights_version = 0
        self.choices = [Completion(i, "", [], None, None, None, None) for i in range(n)]
        self.texts: list[list[str]] = [[] for _ in range(n)]
        self.open = n

    def add(self, delta: OutputDelta) -> bool:
        """True if this delta ended the request."""
        choice = self.choices[delta.index]
        self.weights_version = delta.weights_version  # no update comes in the middle of a batch
        choice.token_ids.extend(delta.token_ids)
        self.texts[delta.index].append(delta.text)
        if delta.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or []), *delta.logprobs]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.embedding is not None:
            self.embedding = delta.embedding
        self.num_cached = max(self.num_cached, delta.num_cached_tokens if delta.index == 0 else 0)
        if delta.finish_reason is None:
            return False
        choice.finish_reason, choice.stop_reason = delta.finish_reason.value, delta.stop_reason
        choice.timings, choice.error = delta.timings, delta.error
        choice.text = "".join(self.texts[delta.index])
        self.open -= 1
        return self.open == 0

    def embedded(self) -> EmbeddingOutput:
        self.check()
        assert self.embedding is not None
        return EmbeddingOutput(
            self.prompt, self.prompt_token_ids, self.embedding, self.num_cached, self.weights_version
        )

    def check(self) -> None:
        """Raises RequestFailedError if a choice ended with an error."""
        for choice in self.choices:
            if choice.error is not None:
                tokens = len(self.prompt_token_ids)
                raise RequestFailedError(f"the prompt of {tokens} tokens failed: {choice.error}")

    def output(self) -> RequestOutput:
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            self.prompt_logprobs,
            self.choices,
            self.num_cached,
            self.weights_version,
        )
