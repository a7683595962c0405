"""What a request asks of the sampler beyond a greedy token, as bits. Host and device read the same table."""

from __future__ import annotations

from jinfer.sampling.params import SamplingParams

HISTORY, BIAS, BAN, RANDOM, TOP_K, TOP_P, MIN_P, LOGPROBS = (1 << i for i in range(8))


def of(params: SamplingParams) -> int:
    """The bits of one request."""
    random = not params.greedy
    return (
        (HISTORY if params.needs_history else 0)
        | (BIAS if params.logit_bias else 0)
        | (BAN if params.min_tokens else 0)
        | (RANDOM if random else 0)
        | (TOP_K if random and params.top_k > 0 else 0)
        | (TOP_P if random and params.top_p < 1 else 0)
        | (MIN_P if random and params.min_p > 0 else 0)
        | (LOGPROBS if params.logprobs is not None else 0)
    )


def needs_tables(params: SamplingParams) -> bool:
    """True if the slot's history, bias or end-token table must be set when the request gets its slot."""
    return bool(of(params) & (HISTORY | BIAS | BAN))
