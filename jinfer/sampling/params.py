"""SamplingParams: what one request asks of the sampler. Every field acts; a value out of range is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import numpy as np

from jinfer.errors import RequestError, shown

MAX_LOGPROBS = 20  # top_logprobs per position, as in the OpenAI API
MAX_LOGIT_BIAS = 1024  # entries of logit_bias per request: they live in a fixed table on device
MAX_STOP_IDS = 64  # end-of-sequence and stop token ids per request, for the same reason
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_N = 64
SEED_LIMIT = 2**63
RANDOM_SEED = -1
# Logits divided by it and then by the lowest temperature stay far below float32's largest number, 3.4e38.
MIN_REPETITION_PENALTY = 1e-6


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise RequestError(f"{name} is {shown(value)}, expected {expected}", param=name)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


PLAIN = frozenset({int, float, bool, type(None)})


def _plain(value: Any) -> Any:
    """numpy's numbers and truth values as Python's; anything else as it is."""
    return value.item() if type(value) not in PLAIN and isinstance(value, np.generic) else value


def _as_tuple(values: Any) -> Any:
    """None as (), an iterable or array as a tuple; what is no list of anything stays, to be refused."""
    if values is None:
        return ()
    if hasattr(values, "tolist"):
        values = values.tolist()
    is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping)
    return tuple(values) if is_list else values


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of one request. The order of effect is: penalties and logit bias, temperature, top-k, top-p,
    min-p, draw. A draw depends only on (seed, position), so a seeded request repeats whatever runs beside it.

    temperature: 0 means greedy. top_k: 0 or -1 means all. top_p in (0, 1]. min_p in [0, 1].
    seed: None or -1 means that the engine picks one, as vLLM and llama.cpp have it. repetition_penalty in [1e-6, 100],
    over prompt and output tokens: less, and penalized logits would overflow. presence_penalty, frequency_penalty in
    [-2, 2], over output tokens. logit_bias: token id -> [-100, 100].
    stop: strings that end the output and are not in its text; one that is exactly a special token ("<|user|>") acts as
    that token's id where special tokens are left out of the text, since no text could ever match it.
    stop_token_ids: ids that end the output, beside the model's own. min_tokens: no end token is drawn before that many,
    the model's own not even with ignore_eos. max_tokens: None means as many as fit. logprobs: number of alternatives
    per output token (0: only the chosen one's), None for none; likewise prompt_logprobs. They are of the raw
    distribution, before penalties and temperature. n: how many outputs, as forks that share the prompt's pages; the
    first draws with `seed`, the others with hashes of it and their index, so neighbouring seeds share no output.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if type(value) not in PLAIN:
                object.__setattr__(self, name, _plain(value))
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple(self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(map(_plain, ids)) if isinstance(ids, tuple) else ids)
        if isinstance(self.logit_bias, Mapping):
            bias = {_plain(token): _plain(value) for token, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        def number(name: str, low: float, high: float, text: str, open_low: bool = False) -> None:
            v = getattr(self, name)
            _check(_is_number(v) and (v > low if open_low else v >= low) and v <= high, name, v, text)

        def integer(name: str, low: int, high: int, optional: bool = False) -> None:
            v: Any = getattr(self, name)
            if v is None and optional:
                return
            _check(_is_int(v) and low <= v <= high, name, v, f"an integer from {low} to {high}")

        number("temperature", 0.0, 100.0, "a number from 0 to 100")
        number("top_p", 0.0, 1.0, "a number above 0, at most 1", open_low=True)
        number("min_p", 0.0, 1.0, "a number from 0 to 1")
        number("presence_penalty", -2.0, 2.0, "a number from -2 to 2")
        number("frequency_penalty", -2.0, 2.0, "a number from -2 to 2")
        number("repetition_penalty", MIN_REPETITION_PENALTY, 100.0, "a number from 1e-6 to 100")
        integer("n", 1, MAX_N)
        integer("top_k", -1, 2**31 - 1)
        integer("seed", -SEED_LIMIT, SEED_LIMIT - 1, optional=True)
        integer("min_tokens", 0, 2**31 - 1)
        integer("max_tokens", 1, 2**31 - 1, optional=True)
        integer("logprobs", 0, MAX_LOGPROBS, optional=True)
        integer("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None:
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens ({self.max_tokens})",
            )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")

    def _check_lists(self) -> None:
        _check(
            isinstance(self.stop, tuple)
            and len(self.stop) <= MAX_STOP_STRINGS
            and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop),
            "stop",
            self.stop,
            f"at most {MAX_STOP_STRINGS} non-empty strings of at most {MAX_STOP_LENGTH} characters",
        )
        _check(
            isinstance(self.stop_token_ids, tuple)
            and len(self.stop_token_ids) <= MAX_STOP_IDS // 2
            and all(_is_int(t) and t >= 0 for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            f"at most {MAX_STOP_IDS // 2} token ids",
        )
        if self.logit_bias is not None:
            _check(
                isinstance(self.logit_bias, Mapping)
                and len(self.logit_bias) <= MAX_LOGIT_BIAS
                and all(
                    _is_int(k) and k >= 0 and _is_number(v) and -100 <= v <= 100
                    for k, v in self.logit_bias.items()
                ),
                "logit_bias",
                self.logit_bias,
                f"at most {MAX_LOGIT_BIAS} entries, token id -> number from -100 to 100",
            )
            # A copy: the caller may change its own while the request runs.
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """True if the sampler must know which tokens the prompt and the output have had."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


NUMBERS = tuple(
    f.name for f in fields(SamplingParams) if f.name not in ("logit_bias", "stop", "stop_token_ids")
)
