"""Prometheus metrics, under the names that vLLM's users know, with the prefix `jinfer:`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from jinfer import OutputDelta

LABEL = "model_name"

FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
)
BETWEEN_TOKENS_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
)
BETWEEN_TOKENS_BUCKETS += (2.5, 5)
REQUEST_BUCKETS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
)
REQUEST_BUCKETS += (960,)

# name, what it is, attribute of EngineStats
GAUGES = (
    ("num_requests_running", "requests that own a slot and pages", "num_running"),
    ("num_requests_waiting", "requests in the queue", "num_waiting"),
    ("kv_cache_usage_perc", "share of the KV pages in use, 0 to 1, in the fullest group", "kv_cache_usage"),
    (
        "kv_cache_full_attention_share",
        "KV bytes of a sequence of max_model_len tokens, as a share of what it held if no layer had a window",
        "kv_fraction",
    ),
)
# The same per group of layers that share KV pages: attribute of KVGroupStats.
GROUP_GAUGES = (
    ("kv_cache_group_bytes", "bytes of the KV pages of the layers with this window", "num_bytes"),
    ("kv_cache_group_usage_perc", "share of these KV pages in use, 0 to 1", "usage"),
)
COUNTERS = (
    ("prefix_cache_queries", "prompt tokens looked up in the prefix cache", "prefix_cache_queries"),
    ("prefix_cache_hits", "prompt tokens found in the prefix cache", "prefix_cache_hits"),
    ("prompt_tokens", "prompt tokens processed", "prompt_tokens"),
    ("generation_tokens", "tokens generated", "generation_tokens"),
    ("num_preemptions", "requests put back into the queue for want of pages", "num_preemptions"),
    ("recompiles", "steps compiled after warm-up; more than 0 is a fault", "recompiles"),
)


class Metrics:
    """The server's metrics: histograms filled while requests run, and the engine's figures read at each scrape.

    read_stats: returns EngineStats, or None while there is no engine to ask.
    """

    def __init__(self, model_name: str, read_stats: Callable[[], Any]) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineFigures(model_name, read_stats))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return Histogram(
                f"jinfer:{name}", text, (LABEL,), registry=self.registry, buckets=buckets
            ).labels(model_name)

        self.first_token = histogram(
            "time_to_first_token_seconds", "from arrival to the first token", FIRST_TOKEN_BUCKETS
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "from one token to the next", BETWEEN_TOKENS_BUCKETS
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "from arrival to the last token", REQUEST_BUCKETS
        )
        self.queued = histogram(
            "request_queue_time_seconds", "from arrival to the first step", REQUEST_BUCKETS
        )

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The page that Prometheus reads and its content type, as the Accept header asks."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _EngineFigures:
    """Reads the engine's own counts at each scrape, so that nothing is counted twice."""

    def __init__(self, model_name: str, read_stats: Callable[[], Any]) -> None:
        self._labels = [model_name]
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        for name, text, attribute in GAUGES:
            gauge = GaugeMetricFamily(f"jinfer:{name}", text, labels=[LABEL])
            gauge.add_metric(self._labels, 0 if stats is None else getattr(stats, attribute))
            yield gauge
        yield from self._collect_groups(() if stats is None else stats.kv_groups)
        for name, text, attribute in COUNTERS:
            counter = CounterMetricFamily(f"jinfer:{name}", text, labels=[LABEL])
            counter.add_metric(self._labels, 0 if stats is None else getattr(stats, attribute))
            yield counter
        finished = CounterMetricFamily(
            "jinfer:request_success", "finished requests", labels=[LABEL, "finished_reason"]
        )
        counts = {"stop": 0, "length": 0, "abort": 0, "error": 0} | (
            {} if stats is None else stats.num_requests_finished
        )
        for reason, count in counts.items():
            finished.add_metric([*self._labels, str(reason)], count)
        yield finished

    def _collect_groups(self, groups: Iterable[Any]) -> Iterator[Metric]:
        for name, text, attribute in GROUP_GAUGES:
            gauge = GaugeMetricFamily(f"jinfer:{name}", text, labels=[LABEL, "group", "window"])
            for number, group in enumerate(groups):
                window = "none" if group.window is None else str(group.window)
                gauge.add_metric([*self._labels, str(number), window], getattr(group, attribute))
            yield gauge


class RequestClock:
    """Observes the latencies of one HTTP request from its deltas."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.monotonic()
        self._last: dict[tuple[int, int], float] = {}  # (prompt, choice) -> when its last token came
        self._begun: set[int] = set()  # prompts that have their first token, from whichever choice

    def observe(self, prompt: int, delta: OutputDelta) -> None:
        """Takes a delta at the moment it arrives."""
        now = time.monotonic()
        count = len(delta.token_ids)
        if count:
            key = (prompt, delta.index)
            before = self._last.get(key)
            if prompt not in self._begun:
                self._begun.add(prompt)
                self._metrics.first_token.observe(now - self._arrival)
            if before is None:
                count -= 1  # what comes with the first token came at once: no gap to speak of
                before = now
            for _ in range(count):
                self._metrics.between_tokens.observe((now - before) / count)
            self._last[key] = now
        times = delta.timings
        if delta.finish_reason is not None and times is not None:
            if times.scheduled is not None:
                self._metrics.queued.observe(times.scheduled - times.arrival)
            if times.finished is not None:
                self._metrics.whole.observe(times.finished - times.arrival)
