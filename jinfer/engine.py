"""The engine: requests in, deltas out, one step at a time.

With overlap a step is dispatched before the last one's tokens are read, so the device always has work:

    step()    schedule n+1 | dispatch n+1 | read n | commit n -> deltas
    device    ...... n ............ | n+1 ...........

A row whose end is found in n has one more token computed in n+1, which commit throws away.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence

from jinfer.admission import Admission, CheckedPrompt, check_salt, choice_seed, read_priority
from jinfer.config import EngineConfig
from jinfer.defaults import generation_end_ids
from jinfer.errors import JinferError, RequestError, RequestFailedError, WeightsError
from jinfer.interrupts import uninterrupted
from jinfer.kv_plan import plan_kv
from jinfer.models.decoder import Params
from jinfer.outputs import OutputStream
from jinfer.packing import slot_fields
from jinfer.platform import prepare_platform, refuse_disabled_jit
from jinfer.pooling import PoolingParams
from jinfer.request import FinishReason, OutputDelta, Request, RequestFault
from jinfer.runner import INCOMPLETE, Runner, StepHandle
from jinfer.sampling.params import SamplingParams
from jinfer.schedule.batch import Batch, BatchRow
from jinfer.schedule.scheduler import Scheduler
from jinfer.stats import Counters, EngineStats, describe_cache, snapshot
from jinfer.text import ChatTemplate, Tokenizer

logger = logging.getLogger(__name__)

NOT_FINITE_MESSAGE = (
    "the model's output is not finite (NaN or infinity): its weights are damaged, or a value has overflowed the compute "
    "type; check the checkpoint, or start with --dtype float32"
)


class Engine:
    """One model on one mesh. Not thread-safe: one thread owns it (see `AsyncEngine`).

    Where that is the main thread, signal handlers (Ctrl-C, an alarm) run between its methods, never within one.
    """

    def __init__(self, config: EngineConfig) -> None:
        prepare_platform(config)
        refuse_disabled_jit()
        from jinfer.models.loading import load_model
        from jinfer.weights.hub import resolve_model

        self.config = config
        started = time.monotonic()
        model = load_model(config)
        self.model_config, self.folder = model.config, model.folder
        text_folder = resolve_model(config.tokenizer, weights=False) if config.tokenizer else model.folder
        self.tokenizer = Tokenizer.from_folder(text_folder)
        self.chat_template = ChatTemplate.from_folder(text_folder)
        self.kv_plan = plan_kv(model.spec, model.mesh, config)
        self.runner = Runner(model, config, self.kv_plan)
        self.scheduler = Scheduler(
            groups=[group.size for group in self.kv_plan.groups],
            page_size=self.kv_plan.page_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.kv_plan.max_model_len,
            max_num_waiting=config.max_num_waiting,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            recompute_beyond=self.model_config.recompute_length,
            max_seqs_per_group=config.max_seqs_per_request,
        )
        self.end_ids = frozenset(self.tokenizer.eos_ids) | frozenset(self.model_config.eos_token_ids)
        self.end_ids |= generation_end_ids(config.generation_config, self.folder, self.vocab_size)
        # The tokenizer may know tokens that the model has no row for.
        self.end_ids = frozenset(i for i in self.end_ids if i < self.vocab_size)
        self.admission = Admission(
            self.scheduler, self.tokenizer, self.vocab_size, self.end_ids, seed=config.seed
        )
        self._streams: dict[Request, OutputStream] = {}
        self._pending: StepHandle | None = None
        self._ended: list[OutputDelta] = []  # ends that no step caused: reported by the next step
        self._counters = Counters()
        self._cache_config = describe_cache(config, self.kv_plan, str(self.runner.cache_dtype))
        loaded = time.monotonic()
        seconds = self.runner.warmup() if config.warmup else 0.0
        logger.info("loaded in %.1f s, compiled in %.1f s", loaded - started, seconds)
        logger.info("KV pages of %d tokens: %s", self.kv_plan.page_size, self.kv_plan)

    # Facts

    @property
    def max_model_len(self) -> int:
        return self.kv_plan.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def weights_version(self) -> int:
        """Updates of the weights since the load."""
        return self.runner.weights_version

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or self._pending is not None or bool(self._ended)

    def stats(self) -> EngineStats:
        return snapshot(
            self.scheduler, self._counters, self.kv_plan, self.runner.recompiles, self._cache_config
        )

    # Requests

    def validate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, prompt_only: bool = False
    ) -> CheckedPrompt:
        """The prompt, whose ids `add_request` does not check again; `prompt_only`: see there. For any thread.

        Raises:
          RequestError: a request with these could not run.
        """
        return self.admission.check(prompt_token_ids, params, prompt_only=prompt_only)

    @uninterrupted
    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        pooling: PoolingParams | None = None,
        prompt_only: bool = False,
        priority: int = 0,
        cache_salt: str = "",
        group: str = "",
        arrival_time: float | None = None,
    ) -> None:
        """Queues a request; its n choices are forks that share the prompt's pages.

        group: requests of the same name count as one for `EngineConfig.max_seqs_per_request`.
        pooling: the prompt's embedding is wanted, with the last delta, and no text; give `EMBED` as params.
        prompt_only: the token that follows the prompt is not wanted, so the prompt may have max_model_len tokens; give
          max_tokens=1. Every embedding is such a request.

        Raises:
          RequestError: it can never run, or its id is in use. QueueFullError: it cannot now. RequestFailedError: a
          fault in making it ready. WeightsError: an update of the weights failed midway. Nothing of it stays then.
        """
        if not self.runner.has_weights:
            raise WeightsError(INCOMPLETE)
        refuse_disabled_jit()
        if self.scheduler.has(request_id):
            raise RequestError(f"request id {request_id!r} is in use: choose another, or wait for its end")
        if pooling is None and not self.model_config.has_head:
            raise RequestError(
                "the checkpoint has no head, so this model embeds and does not generate or score: ask for embeddings, "
                "or serve a checkpoint of the model's causal language model"
            )
        prompt_only |= pooling is not None
        prompt = self.validate(prompt_token_ids, params, prompt_only=prompt_only)
        check_salt(cache_salt)
        priority = read_priority(priority)
        arrival = time.monotonic() if arrival_time is None else arrival_time
        ends = self.admission.end_tokens(params)
        seed = self.admission.seed(params)
        private = "" if self.config.enable_prefix_caching else f"fork:{request_id}"
        leader: Request | None = None
        try:
            for index in range(params.n):
                request = Request(
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    params=params,
                    pooling=pooling,
                    prompt_only=prompt_only,
                    seed=choice_seed(seed, index),
                    priority=priority,
                    arrival_time=arrival,
                    group=group,
                    cache_salt=private or cache_salt,
                    # The mean needs the hidden states of all tokens: those of cached pages are not kept.
                    cacheable=self._is_cacheable(len(prompt), params)
                    and (pooling is None or pooling.pooling != "mean"),
                    index=index,
                    leader=leader,
                    end_token_ids=ends.ids,
                    banned_token_ids=ends.banned,
                    stop_names=ends.names,
                    max_total_tokens=self.max_model_len
                    if params.max_tokens is None
                    else min(self.max_model_len + prompt_only, len(prompt) + params.max_tokens),
                )
                request.packed = slot_fields(request)
                self.scheduler.add(request)
                first = None if leader is None else self._streams[leader]
                self._streams[request] = OutputStream.open(request, self.tokenizer, first)
                leader = leader or request
        except BaseException as error:
            for request in self.scheduler.abort(request_id):
                self._streams.pop(request, None)
            if isinstance(error, JinferError) or not isinstance(error, Exception):
                raise
            logger.exception("request %s could not be made ready", request_id)
            raise RequestFailedError(
                f"request {request_id!r} could not be made ready ({type(error).__name__}: {error}): this is a fault "
                "of the engine, please report it"
            ) from error

    def _is_cacheable(self, prompt_length: int, params: SamplingParams) -> bool:
        if not self.config.enable_prefix_caching and params.n == 1:
            return False
        # Beyond the original length these angles depend on the whole prompt's length, not on the prefix alone.
        fixed = self.model_config.fixed_angles_length
        return fixed is None or prompt_length <= fixed

    @uninterrupted
    def abort(self, request_id: str, *, silent: bool = False) -> None:
        """Ends a request; its pages are free at once. Unknown ids are ignored: it may just have ended.

        silent: the next step's deltas do not tell of it, for a caller who has stopped listening.
        """
        for request in self.scheduler.abort(request_id):
            self._close(request, silent)

    @uninterrupted
    def fail_all(self, message: str) -> list[OutputDelta]:
        """Ends everything with an error: the engine's own fault."""
        self._fail_streams(message)
        deltas, self._ended = self._ended, []
        return deltas

    def _fail_streams(self, message: str) -> None:
        for request in list(self._streams):
            self._fail(request, message)
        self._pending = None
        self.scheduler.reset_prefix_cache()

    def _fail(self, request: Request, message: str) -> None:
        stream = self._streams.pop(request)
        stream.error = message
        self.scheduler.fail(request)
        delta = stream.delta([], "", None)
        delta.finish_reason, delta.error = FinishReason.ERROR, message
        self._counters.finished[FinishReason.ERROR.value] += 1
        self._ended.append(delta)

    def _close(self, request: Request, silent: bool) -> None:
        stream = self._streams.pop(request, None)
        if stream is not None:
            self._count_end(request)
            if not silent:
                self._ended.append(stream.delta([], stream.flush(), None))

    def _count_end(self, request: Request) -> None:
        assert request.finish_reason is not None
        self._counters.finished[request.finish_reason.value] += 1

    # Steps

    @uninterrupted
    def step(self) -> list[OutputDelta]:
        """Dispatches the next step and returns what the one before (with overlap) or this one yielded.

        If it raises, tokens are lost: end what runs with `abort` or `fail_all`. Where the KV was lost too, every request
        has failed, and the next step says so.
        """
        try:
            return self._step()
        except BaseException:
            # Pages that a lost step was to fill must not be found by those who come later.
            self.scheduler.reset_prefix_cache()
            # The scheduler has ended these already, so no abort finds them: the next step reports their end.
            for request in [r for r in self._streams if r.finished]:
                self._fail(request, "the step that ended it failed, and its last tokens are lost")
            if self.runner.lost_state():
                self._fail_streams("a step failed, and the keys and values of all requests are lost with it")
                self.runner.make_state()
            raise

    def _step(self) -> list[OutputDelta]:
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        waited = 0.0
        dispatched = self._dispatch(self.scheduler.schedule())
        ready = self._pending if self.config.async_scheduling else dispatched
        self._pending = dispatched if self.config.async_scheduling else None
        deltas: list[OutputDelta] = []
        if ready is not None:
            wait = time.perf_counter()
            tokens = ready.tokens()
            waited = time.perf_counter() - wait
            self._commit(ready, tokens, deltas)
        version = self.weights_version if ready is None else ready.weights_version
        for delta in deltas:
            delta.weights_version = version
        counters = self._counters
        if dispatched is not None:
            counters.count_step(dispatched.batch.num_tokens)
        counters.wait_seconds += waited
        counters.host_seconds += time.perf_counter() - begin - waited
        counters.host_cpu_seconds += time.thread_time() - begin_cpu
        deltas, self._ended = self._ended + deltas, []
        return deltas

    def _dispatch(self, batch: Batch | None) -> StepHandle | None:
        """Starts a step. A request whose own data are at fault ends, and the others go on without it."""
        faults, self.scheduler.faults = self.scheduler.faults, []
        for request, error in faults:
            self._blame(request, error)
        while batch is not None:
            try:
                return self.runner.dispatch(batch)
            except RequestFault as fault:
                self._blame(fault.request, fault.error)
                batch = batch.without(fault.request)
        return None

    def _blame(self, request: Request, error: Exception) -> None:
        logger.error("request %s: its step could not be made", request.request_id, exc_info=error)
        self._fail(request, f"making the request's step failed: {type(error).__name__}: {error}")

    def _commit(self, handle: StepHandle, tokens: list[int], deltas: list[OutputDelta]) -> None:
        rows = handle.batch.rows
        if min(tokens) < 0:
            # A vector may be well where the head that nobody asked is not: it is looked at by itself.
            self._end_not_finite(
                row for row, token in zip(rows, tokens) if token < 0 and row.request.pooling is None
            )
        table, index_of = None, {}
        asking = [row for row in rows if row.request.wants_more]
        if asking:
            if any(row.request.params.prompt_logprobs is not None and not row.from_slot for row in asking):
                self._keep_prompt_logprobs(handle)
            if any(row.request.pooling is not None for row in asking):
                self._keep_pooled(handle)
            if any(row.request.params.logprobs is not None for row in asking):
                table = handle.logprobs()
                index_of = {id(row): i for i, row in enumerate(rows)}
                self._end_not_finite(
                    row
                    for row, chosen in zip(rows, table.chosen)
                    if math.isnan(chosen) and row.request.params.logprobs is not None
                )
        appended = self.scheduler.commit(handle.batch, tokens)
        self._counters.generation_tokens += len(appended)
        for row, token in appended:
            request = row.request
            stream = self._streams[request]
            if request.pooling is not None:
                # The token that every prompt yields at its end is not asked for.
                self._counters.generation_tokens -= 1
                self._count_end(request)
                del self._streams[request]
                deltas.append(stream.delta([], "", None))
                continue
            text = self._text_of(stream, token)
            if request.finished and stream.error is None:
                text += stream.flush()
            # Text that the end lets go may complete a stop string too.
            if stream.detokenizer.stopped_by is not None:
                self.scheduler.finish(request, FinishReason.STOP, stream.detokenizer.stopped_by)
            if request.finished:
                self._count_end(request)
                del self._streams[request]
            logprobs = None
            if table is not None and request.params.logprobs is not None:
                logprobs = [table.of(index_of[id(row)], token, request.params.logprobs)]
            deltas.append(stream.delta([token], text, logprobs))

    def _text_of(self, stream: OutputStream, token: int) -> str:
        """The text that a token adds. A fault in it ends this request and no other."""
        try:
            return stream.push(token)
        except Exception as error:
            logger.exception("request %s: token %d has no text", stream.request.request_id, token)
            self.scheduler.finish(stream.request, FinishReason.ERROR)
            stream.error = f"detokenizing token {token} failed: {type(error).__name__}: {error}"
            return ""

    def _end_not_finite(self, rows: Iterable[BatchRow]) -> None:
        """Ends the requests of rows whose logits or vectors are not finite, or makes their pages unfindable if they
        have ended since."""
        for request in [row.request for row in rows]:
            if request in self._streams:
                self._counters.not_finite += 1
                self._fail(request, NOT_FINITE_MESSAGE)
            else:
                self.scheduler.fail(request)

    def _keep_prompt_logprobs(self, handle: StepHandle) -> None:
        table, at, faulty = None, 0, []
        for row in handle.batch.rows:
            stream = self._streams.get(row.request)
            start, count = row.start, row.count
            if stream is not None and stream.prompt_logprobs is not None and not row.from_slot:
                table = table or handle.prompt_logprobs()
                assert table is not None
                assert row.request.params.prompt_logprobs is not None
                prompt = row.request.prompt_token_ids
                count = min(count, len(prompt) - 1 - start)
                if any(map(math.isnan, table.chosen[at : at + count])):
                    faulty.append(row)
                for i in range(count):
                    stream.prompt_logprobs[start + i + 1] = table.of(
                        at + i, prompt[start + i + 1], row.request.params.prompt_logprobs
                    )
            at += row.count
        self._end_not_finite(faulty)

    def _keep_pooled(self, handle: StepHandle) -> None:
        table, faulty = handle.pooled(), []
        assert table is not None
        for index, row in enumerate(handle.batch.rows):
            stream = self._streams.get(row.request)
            if stream is not None and stream.pool is not None:
                stream.pool.add(table, index, row.start)
                if not stream.pool.is_finite:
                    faulty.append(row)
        self._end_not_finite(faulty)

    def drain(self) -> Iterable[OutputDelta]:
        """Runs until nothing is left; yields deltas."""
        while self.has_unfinished:
            yield from self.step()

    @uninterrupted
    def update_weights(self, params: Params) -> None:
        """Swaps the weights for others of the same shapes, in place and without recompiling.

        All is checked before the first array moves. What runs goes on with the new weights, and each delta says which
        version made it; cached prefixes of the old ones are not offered any more.

        Raises:
          ModelError: a parameter is missing, unknown, misshaped or not finite, or the first one could not be placed;
            nothing is changed then.
          WeightsError: it failed midway. What runs has failed, and nothing is taken until a full update has succeeded.
        """
        with self.runner.preparing():
            self._update_weights(params)

    def _update_weights(self, params: Params) -> None:
        checked = self.runner.check_weights(params)
        # Before the first one moves: whatever happens then, no page of the old weights is found.
        self.scheduler.reset_prefix_cache()
        try:
            self.runner.move_weights(checked)
        except BaseException:
            if not self.runner.has_weights:
                self._fail_streams("an update of the weights failed midway, and the engine has none")
            raise

    def check_integrity(self) -> None:
        """Raises IntegrityError if the scheduler's books do not balance."""
        self.scheduler.check_integrity()
