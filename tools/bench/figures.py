"""From what was observed of each request to the figures that are reported.

The words are those of the field: TTFT is the time from a request's arrival to its first token; ITL the gap between two
pieces of output that follow each other (a piece is one token wherever the system hands tokens out one by one); TPOT
the mean time per output token after the first; E2E the time from arrival to the last token.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LATENCIES = ("ttft", "tpot", "itl", "e2e")
Figures = dict[str, float]


@dataclass
class RequestRecord:
    """One request as it was observed. Times are seconds on one clock; `token_times` has one per piece of output."""

    index: int
    start: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that the system says it found in its prefix cache
    token_times: list[float] = field(default_factory=list)
    end: float = 0.0
    token_ids: list[int] = field(default_factory=list)  # of the output, where the system gives them
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def e2e(self) -> float:
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """None for an output of one token."""
        if self.output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:])]

    def meets(self, limits: Mapping[str, float]) -> bool:
        """True if no latency is over its limit (seconds by name); a request without a TPOT cannot miss it."""
        if self.error is not None:
            return False
        values = {"ttft": self.ttft, "tpot": self.tpot, "e2e": self.e2e}
        return all((value := values[name]) is None or value <= limit for name, limit in limits.items())


@dataclass
class RunResult:
    """One run of all requests through one system. figures: what only this system knows (host time, KV waste)."""

    records: list[RequestRecord]
    figures: Figures = field(default_factory=dict)
    others_cpu: float | None = None  # share of all cores that other processes used meanwhile

    @property
    def good(self) -> list[RequestRecord]:
        return [record for record in self.records if record.error is None]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        if not self.good:
            return 0.0
        return max(r.end for r in self.good) - min(r.start for r in self.records)

    def latencies(self, name: str) -> list[float]:
        """All values of one of LATENCIES, in seconds."""
        if name == "itl":
            return [gap for record in self.good for gap in record.itl]
        values = [getattr(record, name) for record in self.good]
        return [value for value in values if value is not None]


def summarize(run: RunResult, limits: Mapping[str, float] | None = None) -> Figures:
    """All figures of a run; latencies in milliseconds, named as `ttft_ms.p95`."""
    good, seconds = run.good, run.seconds
    output = sum(r.output_tokens for r in good)
    prompt = sum(r.prompt_tokens for r in good)
    figures: Figures = {
        "requests": len(run.records),
        "errors": len(run.records) - len(good),
        "prompt_tokens": prompt,
        "cached_prompt_tokens": sum(r.cached_tokens for r in good),
        "output_tokens": output,
        "seconds": seconds,
    }
    if seconds > 0:
        figures["requests_per_second"] = len(good) / seconds
        figures["output_tokens_per_second"] = output / seconds
        figures["total_tokens_per_second"] = (prompt + output) / seconds
    for name in LATENCIES:
        values = np.array(run.latencies(name)) * 1000
        if len(values):
            figures[f"{name}_ms.mean"] = float(values.mean())
            for percent in (50, 95, 99):
                figures[f"{name}_ms.p{percent}"] = float(np.percentile(values, percent))
    if limits and seconds > 0:
        met = sum(record.meets(limits) for record in run.records)
        figures["goodput_requests_per_second"] = met / seconds
        figures["goodput_share"] = met / len(run.records)
    if run.others_cpu is not None:
        figures["others_cpu_share"] = run.others_cpu
    return figures | run.figures


def medians(runs: Sequence[Figures]) -> Figures:
    """The median of each figure over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run[name] for run in runs if name in run) for name in names}


@dataclass(frozen=True)
class Ratio:
    """How often A has what B has: the median over neighbouring pairs of runs, the lowest and the highest."""

    median: float
    low: float
    high: float


def ratio(a: Sequence[Figures], b: Sequence[Figures], name: str) -> Ratio | None:
    """A's figure over B's, pair by pair: neighbours in time share the machine's mood. None if either lacks it."""
    pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True) if name in x and y.get(name)]
    if not pairs:
        return None
    ratios = [x / y for x, y in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Agreement:
    """How far two systems gave the same greedy tokens.

    requests: share with identical outputs; tokens: share of tokens before the first difference in their request,
    after which two outputs have different contexts and cannot be compared.
    """

    requests: float
    tokens: float


def agreement(a: RunResult, b: RunResult) -> Agreement:
    """Of the requests that both systems finished."""
    others = {record.index: record.token_ids for record in b.good}
    pairs = [(record.token_ids, others[record.index]) for record in a.good if record.index in others]
    longest = sum(max(len(x), len(y)) for x, y in pairs)
    return Agreement(
        requests=sum(x == y for x, y in pairs) / max(len(pairs), 1),
        tokens=sum(first_difference(x, y) for x, y in pairs) / max(longest, 1),
    )


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
