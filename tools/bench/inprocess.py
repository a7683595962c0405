"""jinfer's engine driven in this process: the offline and the single-stream benchmark."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from jinfer import LLM, ConfigError, EngineConfig, FinishReason, SamplingParams
from tools.bench.figures import Figures, RequestRecord, RunResult
from tools.bench.machine import CpuWatch
from tools.bench.workload import BenchRequest, Vocabulary, shortened


class EngineSystem:
    """One engine, stepped by hand so that every token's time is seen.

    Args:
      concurrency: requests that are in the engine at once; None: all are handed over at the start.
    """

    name = "jinfer"

    def __init__(self, config: EngineConfig, longest: int, concurrency: int | None) -> None:
        self.llm = LLM(**vars(config))
        self.engine = self.llm.engine
        self.concurrency = concurrency
        self._runs = 0
        if longest > self.engine.max_model_len:
            raise ConfigError(
                f"requests have up to {longest} tokens, the engine takes {self.engine.max_model_len}: lower "
                "prompt_len and output_len, or raise max_model_len"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.engine.vocab_size, self.engine.tokenizer.special_ids)

    def warm_up(self, requests: Sequence[BenchRequest]) -> None:
        self.run(shortened(list(requests)))

    def run(self, requests: Sequence[BenchRequest]) -> RunResult:
        """Runs all requests, in order of their index, to their full length."""
        self._runs += 1
        waiting = deque(requests)
        records: dict[str, RequestRecord] = {}
        steps = _StepLog(self.engine)
        watch = CpuWatch()
        begin = time.perf_counter()
        self._feed(waiting, records, begin)
        while self.engine.has_unfinished:
            deltas = self.engine.step()
            now = time.perf_counter()
            steps.add()
            for delta in deltas:
                record = records[delta.request_id]
                record.token_ids.extend(delta.token_ids)
                record.token_times.extend([now] * len(delta.token_ids))
                if delta.finish_reason is not None:
                    _close(record, delta, now)
            # A closed loop's next request arrives when one ends; otherwise all arrived at the start.
            self._feed(waiting, records, begin if self.concurrency is None else now)
        self.engine.check_integrity()
        return RunResult(list(records.values()), steps.figures(), watch.others())

    def _feed(self, waiting: deque[BenchRequest], records: dict[str, RequestRecord], arrival: float) -> None:
        stats = self.engine.stats()
        room = self.engine.config.max_num_waiting - stats.num_waiting
        if self.concurrency is not None:
            room = min(room, self.concurrency - stats.num_running - stats.num_waiting)
        for _ in range(min(room, len(waiting))):
            request = waiting.popleft()
            assert not isinstance(request.prompt, str), "an engine in this process gets token ids"
            request_id = f"bench-{self._runs}-{request.index}"
            # The engine caches prefixes as it would in use; the salt keeps one run from finding another's.
            self.engine.add_request(
                request_id,
                request.prompt,
                SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True),
                cache_salt=f"bench-{self._runs}",
            )
            records[request_id] = RequestRecord(request.index, arrival, prompt_tokens=len(request.prompt))


def _close(record: RequestRecord, delta: Any, now: float) -> None:
    record.end = now
    record.output_tokens = len(record.token_ids)
    record.cached_tokens = delta.num_cached_tokens
    if delta.finish_reason is not FinishReason.LENGTH:
        record.error = delta.error or f"ended early: {delta.finish_reason.value}"


class _StepLog:
    """What the engine's counters say about the steps of one run."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._first = self._last = engine.stats()
        self._room = engine.scheduler.allocated_tokens, engine.scheduler.used_tokens
        self._rows: list[int] = []
        self._host: list[float] = []

    def add(self) -> None:
        stats = self._engine.stats()
        # Steps at whose both ends as many rows ran: neither a beginning nor an end of a request falls into them.
        self._rows.append(min(stats.num_running, self._last.num_running))
        self._host.append(stats.host_seconds - self._last.host_seconds)
        self._last = stats

    def figures(self) -> Figures:
        first, last = self._first, self._last
        steps = last.steps - first.steps
        peak = max(self._rows, default=0)
        full = [host for rows, host in zip(self._rows, self._host, strict=True) if rows == peak]
        allocated = self._engine.scheduler.allocated_tokens - self._room[0]
        used = self._engine.scheduler.used_tokens - self._room[1]
        figures: Figures = {
            "steps": steps,
            "host_ms_per_step": 1000 * (last.host_seconds - first.host_seconds) / max(steps, 1),
            "peak_rows": peak,
            "host_ms_per_step_at_peak_rows": 1000 * float(np.median(full)) if full else 0.0,
            "device_wait_ms_per_step": 1000 * (last.wait_seconds - first.wait_seconds) / max(steps, 1),
            "kv_waste": 1 - used / allocated if allocated else 0.0,
            "preemptions": last.num_preemptions - first.num_preemptions,
            "recompiles": last.recompiles - first.recompiles,
        }
        return figures
