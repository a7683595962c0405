"""A request's life: what was asked, where it stands, and what came out. No jax here."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jinfer.pooling import PoolingParams
from jinfer.sampling.params import SamplingParams


class RequestState(enum.Enum):
    WAITING = "waiting"  # in the queue: new, or preempted and to be recomputed
    RUNNING = "running"  # owns a slot and pages
    FINISHED = "finished"


class FinishReason(enum.Enum):
    STOP = "stop"  # end token, stop token or stop string
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # a fault in this request or in the engine


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log) at one position, of the raw distribution.

    top_ids, top_logprobs: the most likely tokens, best first. Two tuples: as many pairs would be objects for the garbage
    collector, which took up to 20 ms of a step where answers had 64 choices and 20 log-probabilities a token.
    """

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """The most likely (token id, logprob) pairs, best first."""
        return tuple(zip(self.top_ids, self.top_logprobs, strict=True))


@dataclass(frozen=True)
class RequestTimings:
    """time.monotonic() seconds; None where the request did not get that far.

    queue, prefill, decode and inference are the spans between them: to the first step, from there to the first token,
    from there to the end, and from the first step to the end.
    """

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def queue(self) -> float | None:
        return _span(self.arrival, self.scheduled)

    @property
    def prefill(self) -> float | None:
        return _span(self.scheduled, self.first_token)

    @property
    def decode(self) -> float | None:
        return _span(self.first_token, self.finished)

    @property
    def inference(self) -> float | None:
        return _span(self.scheduled, self.finished)


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated (a request with n > 1 becomes n of these).

    Counts: `num_computed` tokens have their KV written by steps already dispatched; `num_in_flight` tokens were
    sampled by dispatched steps whose results are not read yet, so their ids are unknown to the host.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    pooling: PoolingParams | None = None  # an embedding is wanted, and no text
    prompt_only: bool = (
        False  # the token that follows the prompt is not wanted, and needs no place in the context
    )
    seed: int = 0
    priority: int = 0  # lower runs first
    arrival_time: float = field(default_factory=time.monotonic)
    group: str = (
        ""  # requests of one name share a bound on how many run, see `schedule.shares`; "": its own group
    )
    cache_salt: str = ""
    cacheable: bool = True  # False: neither looks up nor leaves pages in the prefix cache
    index: int = 0  # which of the n choices
    leader: Request | None = None  # a fork waits until its leader's prompt is computed, to share its pages
    end_token_ids: frozenset[int] = frozenset()  # EOS ids (unless ignore_eos) and stop_token_ids
    banned_token_ids: frozenset[int] = (
        frozenset()
    )  # not sampled before min_tokens: the same, EOS always among them
    stop_names: Mapping[int, str] = field(default_factory=dict)  # end tokens that a stop string named
    max_total_tokens: int = 0  # prompt + output may not exceed this
    packed: np.ndarray | None = None  # int32[F]: its row of the slot table, see `packing.slot_fields`

    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it; None for EOS
    output_token_ids: list[int] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    num_in_flight: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    num_recomputed: int = (
        0  # tokens it had when it was computed anew, see Scheduler.recompute_beyond; 0: it was not
    )
    scheduled_time: float | None = None
    first_token_time: float | None = None
    finish_time: float | None = None
    wants_more: bool = field(init=False)  # something beside tokens and their text is to be read back

    def __post_init__(self) -> None:
        params = self.params
        asks = params.logprobs is not None or params.prompt_logprobs is not None
        self.wants_more = asks or self.pooling is not None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens whose ids the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """All tokens, those in flight included."""
        return self.num_known_tokens + self.num_in_flight

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Known token ids at positions [start, stop)."""
        n = len(self.prompt_token_ids)
        if stop <= n:
            return list(self.prompt_token_ids[start:stop])
        if start >= n:
            return self.output_token_ids[start - n : stop - n]
        return list(self.prompt_token_ids[start:]) + self.output_token_ids[: stop - n]

    def timings(self) -> RequestTimings:
        return RequestTimings(self.arrival_time, self.scheduled_time, self.first_token_time, self.finish_time)


class RequestFault(Exception):
    """A fault in one request's own data, met while its part of a step was made. It ends that request alone."""

    def __init__(self, request: Request, error: Exception) -> None:
        super().__init__(f"request {request.request_id}: {type(error).__name__}: {error}")
        self.request, self.error = request, error


@dataclass(slots=True)
class OutputDelta:
    """What one engine step added to one choice of a request. The last delta carries `finish_reason`."""

    request_id: str
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None = None  # one per new token, if asked for
    embedding: np.ndarray | None = None  # float32[E], on the last delta of an embedding request
    # On the first delta of choice 0, if asked for: one entry per prompt token, None for the first.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    timings: RequestTimings | None = None  # on the last delta
    num_preemptions: int = 0  # times it was put back into the queue until now
    error: str | None = None  # with FinishReason.ERROR
    weights_version: int = 0  # updates of the weights before the step that made it


@dataclass
class Completion:
    """One choice of a finished request."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    timings: RequestTimings | None
    error: str | None = None  # what went wrong, with finish_reason "error"


@dataclass
class RequestOutput:
    """A finished request of `LLM.generate`: the prompt and its n completions (`outputs`)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    outputs: list[Completion]
    num_cached_tokens: int
    weights_version: int = 0  # of the weights that made it: 0 as loaded, one more with each update

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Output token ids of the first choice."""
        return self.outputs[0].token_ids


@dataclass
class EmbeddingOutput:
    """What `LLM.embed` gives for one prompt."""

    prompt: str | None
    prompt_token_ids: Sequence[int]
    embedding: np.ndarray  # float32[hidden size]
    num_cached_tokens: int
    weights_version: int = 0  # as in RequestOutput


@dataclass
class ScoreOutput:
    """What `LLM.score` gives for one continuation: natural logarithms of its tokens' probabilities."""

    prompt_token_ids: list[int]
    token_ids: list[int]  # of the continuation
    logprobs: list[float]  # one per token of the continuation
    is_greedy: bool  # each of its tokens is the most likely one: greedy decoding would say just this
    weights_version: int = 0  # as in RequestOutput

    @property
    def logprob(self) -> float:
        """Log-likelihood of the continuation given the prompt."""
        return math.fsum(self.logprobs)
