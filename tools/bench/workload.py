"""The requests of a run, the same for every system that is compared."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from tools.bench.settings import Workload, parse_span

TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by "
    "word but not what all were we when your can said there use an each which she do how their if will up "
    "other about out many then them these so some her would make like him into time has look two more write "
    "go see number no way could "
)
WORDS = tuple(TEXT.split())


@dataclass(frozen=True)
class BenchRequest:
    """One greedy request. `prompt` is token ids, or text. arrival: seconds after the run's start."""

    index: int
    prompt: tuple[int, ...] | str
    max_tokens: int
    arrival: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """Token ids that prompts may be made of: those below `size` that are not special."""

    size: int
    special: Collection[int] = ()

    def usable(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.size), np.fromiter(self.special, dtype=np.int64))


def make_requests(
    workload: Workload,
    vocabulary: Vocabulary | None,
    *,
    variant: int = 0,
    request_rate: float | None = None,
) -> list[BenchRequest]:
    """The requests of one run.

    Args:
      vocabulary: what token ids are drawn from; None: prompts are text, a common word for each token.
      variant: other content with the same lengths and arrivals. Every repeat has its own, so that no repeat finds
        its prompts in a server's prefix cache.
      request_rate: Poisson arrivals, requests per second; None: all arrive at the start.
    """
    count = workload.num_requests
    lengths = np.random.default_rng((workload.workload_seed, 0))
    prompts = lengths.integers(*parse_span("prompt_len", workload.prompt_len), count, endpoint=True)
    outputs = lengths.integers(*parse_span("output_len", workload.output_len), count, endpoint=True)
    arrivals = np.zeros(count)
    if request_rate is not None:
        gaps = np.random.default_rng((workload.workload_seed, 1)).exponential(1 / request_rate, count)
        arrivals = np.cumsum(gaps) - gaps[0]
    content = np.random.default_rng((workload.workload_seed, 2, variant))
    pool = np.arange(len(WORDS)) if vocabulary is None else vocabulary.usable()
    prefix = content.choice(pool, workload.shared_prefix_len)
    requests = []
    for i in range(count):
        ids = np.concatenate([prefix, content.choice(pool, prompts[i])]).tolist()
        prompt = " ".join(WORDS[j] for j in ids) if vocabulary is None else tuple(ids)
        requests.append(BenchRequest(i, prompt, int(outputs[i]), float(arrivals[i])))
    return requests


def shortened(requests: list[BenchRequest], max_tokens: int = 4) -> list[BenchRequest]:
    """The same prompts, all at once and with short outputs: a warm-up."""
    return [BenchRequest(r.index, r.prompt, min(r.max_tokens, max_tokens)) for r in requests]
