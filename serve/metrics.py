"""Prometheus metrics, under the names that vLLM's users know; --metrics-prefix stands in front of each."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from jinfer import OutputDelta, SamplingParams

LABEL = "model_name"
OPENMETRICS = re.compile(r"1(\.\d{1,3}){0,2}")

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
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5),
)
REQUEST_BUCKETS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960),
)
TOKEN_BUCKETS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
CHOICES_BUCKETS = (1, 2, 5, 10, 20, 50)
PREEMPTION_BUCKETS = (0, 1, 2, 5, 10, 20, 50)

# Histograms filled while requests run: attribute of Metrics, name, what it is, buckets.
HISTOGRAMS = (
    ("first_token", "time_to_first_token_seconds", "from arrival to the first token", FIRST_TOKEN_BUCKETS),
    ("between_tokens", "inter_token_latency_seconds", "from one token to the next", BETWEEN_TOKENS_BUCKETS),
    (
        "per_token",
        "request_time_per_output_token_seconds",
        "mean of a request's times from one token to the next",
        BETWEEN_TOKENS_BUCKETS,
    ),
    ("whole", "e2e_request_latency_seconds", "from arrival to the last token", REQUEST_BUCKETS),
    ("queue", "request_queue_time_seconds", "from arrival to the first step", REQUEST_BUCKETS),
    ("prefill", "request_prefill_time_seconds", "from the first step to the first token", REQUEST_BUCKETS),
    ("decode", "request_decode_time_seconds", "from the first token to the last", REQUEST_BUCKETS),
    ("inference", "request_inference_time_seconds", "from the first step to the last token", REQUEST_BUCKETS),
    ("prompt_tokens", "request_prompt_tokens", "tokens of a request's prompt", TOKEN_BUCKETS),
    ("generation_tokens", "request_generation_tokens", "tokens generated for a choice", TOKEN_BUCKETS),
    ("choices", "request_params_n", "choices that a request asks for", CHOICES_BUCKETS),
    ("max_tokens", "request_params_max_tokens", "most tokens that a choice may have", TOKEN_BUCKETS),
    (
        "preemptions",
        "request_num_preemptions",
        "times a choice was put back into the queue for want of pages",
        PREEMPTION_BUCKETS,
    ),
)

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
    ("prompt_tokens_cached", "those of them that the prefix cache had", "prompt_tokens_cached"),
    ("generation_tokens", "tokens generated", "generation_tokens"),
    ("num_preemptions", "requests put back into the queue for want of pages", "num_preemptions"),
    ("recompiles", "steps compiled after warm-up; more than 0 is a fault", "recompiles"),
    (
        "request_not_finite",
        "choices that ended with an error because the model's output was NaN or infinite; more than 0 is a fault",
        "num_not_finite",
    ),
)

METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})


class Metrics:
    """The server's metrics: histograms filled while requests run, and the engine's figures read at each scrape.

    read_stats: returns EngineStats, or None while there is no engine to ask.
    prefix: of every name but http_requests_total, which is not the engine's.
    """

    first_token: Histogram
    between_tokens: Histogram
    per_token: Histogram
    whole: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    inference: Histogram
    prompt_tokens: Histogram
    generation_tokens: Histogram
    choices: Histogram
    max_tokens: Histogram
    preemptions: Histogram

    def __init__(self, model_name: str, read_stats: Callable[[], Any], prefix: str = "jinfer:") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineFigures(model_name, read_stats, prefix))
        for attribute, name, text, buckets in HISTOGRAMS:
            histogram = Histogram(prefix + name, text, (LABEL,), registry=self.registry, buckets=buckets)
            setattr(self, attribute, histogram.labels(model_name))
        self._http_requests = Counter(
            "http_requests", "answered HTTP requests", ("handler", "method", "status"), registry=self.registry
        )

    def count_http(self, method: str, route: str | None, status: int) -> None:
        """Counts an answer. What a client can choose freely is no label: an unknown path or method has one name.

        route: the path as the routes write it (`/v1/models/{name}`), None where none matched.
        """
        known = method if method in METHODS else "other"
        self._http_requests.labels(route or "none", known, f"{status // 100}xx").inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The page that Prometheus reads and its content type, as the Accept header asks."""
        if _wants_openmetrics(accept):
            # Under its other escapings prometheus_client turns the colon of a name, which is legal, into "_".
            page = openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8, version="1.0.0")
            return page, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


def _wants_openmetrics(accept: str) -> bool:
    """True if an Accept header names OpenMetrics in a version that there is."""
    for kind in accept.split(","):
        name, *options = (part.strip() for part in kind.split(";"))
        versions = [option.removeprefix("version=") for option in options if option.startswith("version=")]
        if name == "application/openmetrics-text" and all(OPENMETRICS.fullmatch(each) for each in versions):
            return True
    return False


class _EngineFigures:
    """Reads the engine's own counts at each scrape, so that nothing is counted twice."""

    def __init__(self, model_name: str, read_stats: Callable[[], Any], prefix: str) -> None:
        self._labels = [model_name]
        self._read_stats = read_stats
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        for name, text, attribute in GAUGES:
            gauge = GaugeMetricFamily(self._prefix + name, text, labels=[LABEL])
            gauge.add_metric(self._labels, 0 if stats is None else getattr(stats, attribute))
            yield gauge
        yield from self._collect_groups(() if stats is None else stats.kv_groups)
        for name, text, attribute in COUNTERS:
            counter = CounterMetricFamily(self._prefix + name, text, labels=[LABEL])
            counter.add_metric(self._labels, 0 if stats is None else getattr(stats, attribute))
            yield counter
        finished = CounterMetricFamily(
            self._prefix + "request_success", "finished requests", labels=[LABEL, "finished_reason"]
        )
        counts = {"stop": 0, "length": 0, "abort": 0, "error": 0} | (
            {} if stats is None else stats.num_requests_finished
        )
        for reason, count in counts.items():
            finished.add_metric([*self._labels, str(reason)], count)
        yield finished
        if stats is not None:
            yield self._step_tokens(stats.step_tokens)
            yield self._cache_config(stats.cache_config)

    def _step_tokens(self, steps: Any) -> Metric:
        histogram = HistogramMetricFamily(
            self._prefix + "iteration_tokens_total", "tokens that a step computes", labels=[LABEL]
        )
        counts = itertools.accumulate(steps.counts)
        bounds = [*(str(float(bound)) for bound in steps.buckets), "+Inf"]
        histogram.add_metric(self._labels, list(zip(bounds, counts, strict=True)), sum_value=steps.total)
        return histogram

    def _cache_config(self, facts: Mapping[str, str]) -> Metric:
        names, values = zip(*sorted(facts.items()), strict=True)
        info = GaugeMetricFamily(
            self._prefix + "cache_config_info", "how the KV cache is set up; always 1", labels=[LABEL, *names]
        )
        info.add_metric([*self._labels, *values], 1)
        return info

    def _collect_groups(self, groups: Iterable[Any]) -> Iterator[Metric]:
        for name, text, attribute in GROUP_GAUGES:
            gauge = GaugeMetricFamily(self._prefix + name, text, labels=[LABEL, "group", "window"])
            for number, group in enumerate(groups):
                window = "none" if group.window is None else str(group.window)
                gauge.add_metric([*self._labels, str(number), window], getattr(group, attribute))
            yield gauge


class RequestClock:
    """Observes one HTTP request from its deltas: latencies, lengths, what it asked for.

    params: None where no text is wanted (embeddings).
    """

    def __init__(self, metrics: Metrics, params: SamplingParams | None, max_model_len: int) -> None:
        self._metrics = metrics
        self._params = params
        self._max_model_len = max_model_len
        self._arrival = time.monotonic()
        self._last: dict[tuple[int, int], float] = {}  # (prompt, choice) -> when its last token came
        self._counts: dict[tuple[int, int], int] = {}  # its tokens
        self._begun: set[int] = set()  # prompts that have their first token, from whichever choice
        self._ended: set[int] = set()  # prompts of which a choice has ended

    def observe(self, prompt: int, delta: OutputDelta) -> None:
        """Takes a delta at the moment it arrives."""
        now = time.monotonic()
        count = len(delta.token_ids)
        if count:
            key = (prompt, delta.index)
            before = self._last.get(key)
            self._counts[key] = self._counts.get(key, 0) + count
            if prompt not in self._begun:
                self._begun.add(prompt)
                self._metrics.first_token.observe(now - self._arrival)
            if before is None:
                count -= 1  # what comes with the first token came at once: no gap to speak of
                before = now
            for _ in range(count):
                self._metrics.between_tokens.observe((now - before) / count)
            self._last[key] = now
        if delta.finish_reason is not None:
            self._end(prompt, delta)

    def _end(self, prompt: int, delta: OutputDelta) -> None:
        metrics, params = self._metrics, self._params
        if prompt not in self._ended:  # the prompt's own figures count once however many choices share it
            self._ended.add(prompt)
            metrics.prompt_tokens.observe(delta.num_prompt_tokens)
            if params is not None:
                room = self._max_model_len - delta.num_prompt_tokens
                metrics.choices.observe(params.n)
                metrics.max_tokens.observe(
                    room if params.max_tokens is None else min(params.max_tokens, room)
                )
        tokens = self._counts.get((prompt, delta.index), 0)
        if params is not None:
            metrics.generation_tokens.observe(tokens)
        metrics.preemptions.observe(delta.num_preemptions)
        times = delta.timings
        if times is None:
            return
        spans = (
            (metrics.queue, times.queue),
            (metrics.prefill, times.prefill),
            (metrics.decode, times.decode),
            (metrics.inference, times.inference),
        )
        for histogram, seconds in spans:
            if seconds is not None:
                histogram.observe(seconds)
        if times.finished is not None:
            metrics.whole.observe(times.finished - times.arrival)
        if times.decode is not None and tokens > 1:
            metrics.per_token.observe(times.decode / (tokens - 1))
