"""Bounds on what a body may hold, checked before work is done on it.

Parsing keeps Python's lock from beginning to end, and its time goes by values rather than bytes: 4 MB of text take
10 ms, 4 MB of empty lists more than a second. So values are counted first, outside the lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jinfer import SamplingParams
from serve.fields import HARMLESS
from serve.protocol import APIError, bad_request
from serve.state import State

# Per body, in about 50 ms of parsing. The longest conversations of agents have some thousand messages.
MAX_CONTAINERS = 50_000  # objects and lists
MAX_KEYS = 100_000
MAX_STRINGS = 250_000  # keys among them
MAX_VALUES = 1_000_000  # members of lists and objects: token ids of many prompts, mostly
MAX_MEMBERS = 64  # of one field that is a list or an object
MAX_BIASES = 1024
MAX_FIELDS = 256
# Fields that may be long; they have limits of their own, in tokens or in what a template makes of them.
LONG_FIELDS = HARMLESS | {
    "chat_template_kwargs",
    "documents",
    "input",
    "messages",
    "prompt",
    "tokens",
    "tools",
}

_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_OPENING = b"[{"
_PIECE = 256 * 1024  # bytes that are looked at together, with what is made of them in a core's cache


@dataclasses.dataclass
class _Counts:
    """Of the characters that structure JSON."""

    containers: int = 0
    keys: int = 0
    quotes: int = 0
    values: int = 0

    def add(self, text: np.ndarray, among: np.ndarray | None = None) -> None:
        """Counts in uint8[N], where bool[N] `among` says so; quotes are for the caller to count."""

        def count(characters: bytes) -> int:
            found = (text == each for each in characters)
            return sum(int(np.count_nonzero(each if among is None else each & among)) for each in found)

        self.containers += count(_OPENING)
        self.keys += count(bytes([_COLON]))
        self.values += count(bytes([_COMMA]))

    def excess(self) -> str:
        """What there is more of than is taken, and how much is; "" if all is well."""
        for found, most, what in (
            (self.containers, MAX_CONTAINERS, "objects and lists"),
            (self.keys, MAX_KEYS, "keys"),
            (self.quotes // 2, MAX_STRINGS, "strings"),
            (self.values, MAX_VALUES, "values"),
        ):
            if found > most:
                return f"more than {most} {what}"
        return ""


def check_values(raw: bytes) -> None:
    """Raises APIError (400) for JSON of too many values, without parsing it. Anything but JSON passes, or is refused
    for the same reason. Takes about a millisecond per megabyte, outside Python's lock."""
    text = np.frombuffer(raw, np.uint8)
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    # Most bodies are well even if everything in their strings counts.
    if not _most_counts(pieces).excess():
        return
    counts = _Counts()
    escapes = in_string = False
    for piece in pieces:
        quotes = piece == _QUOTE
        backslashes = np.flatnonzero(piece == _BACKSLASH)
        if escapes or len(backslashes):
            escaped = _escaped(backslashes, escapes)
            escapes = len(escaped) > 0 and bool(escaped[-1] == len(piece))
            quotes[escaped[: len(escaped) - escapes]] = False
        # 1 from an opening quote to the character in front of the closing one.
        inside = np.bitwise_xor.accumulate(quotes.view(np.uint8))
        if in_string:
            np.bitwise_xor(inside, 1, out=inside)
        in_string = bool(inside[-1])
        counts.quotes += int(np.count_nonzero(quotes))
        counts.add(piece, inside == 0)
        if excess := counts.excess():
            raise APIError(400, f"the body has {excess}: send less in one request", code="body_too_complex")


def _most_counts(pieces: Sequence[np.ndarray]) -> _Counts:
    """As many as there can be: in strings too."""
    counts = _Counts()
    for piece in pieces:
        counts.add(piece)
        counts.quotes += int(np.count_nonzero(piece == _QUOTE))
        if counts.excess():
            break
    return counts


def _escaped(backslashes: np.ndarray, first: bool) -> np.ndarray:
    """Where the characters stand that backslashes escape: behind each run of an odd number of them.

    first: a backslash in front of the text escapes its first character. One behind the text may be among the results.
    """
    if first and len(backslashes) and backslashes[0] == 0:
        backslashes = backslashes[1:]  # escaped itself
    breaks = np.diff(backslashes) != 1
    starts = backslashes[np.concatenate(([True], breaks))] if len(backslashes) else backslashes
    ends = backslashes[np.concatenate((breaks, [True]))] if len(backslashes) else backslashes
    escaped = ends[(ends - starts) % 2 == 0] + 1
    return np.concatenate(([0], escaped)) if first else escaped


def check_fields(body: dict[str, Any]) -> None:
    """Raises APIError (400) for a field with more members than any request needs."""
    if len(body) > MAX_FIELDS:
        raise bad_request(f"the body has {len(body)} fields, at most {MAX_FIELDS} are taken")
    for name, value in body.items():
        if name in LONG_FIELDS or not isinstance(value, dict | list):
            continue
        most = MAX_BIASES if name == "logit_bias" else MAX_MEMBERS
        if len(value) > most:
            raise bad_request(
                f"{name[:100]} has {len(value)} members, at most {most} are taken",
                name[:100],
                "too_many_members",
            )


# Log-probabilities of one answer, which is kept until its end: a hundred bytes each here, and as many in JSON.
MAX_LOGPROBS = 1_000_000


def bounded_params(
    state: State,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    streams: bool,
    echoes: bool = False,
) -> SamplingParams:
    """The parameters, so that the answer has MAX_LOGPROBS log-probabilities at most.

    Of a stream only the prompt's count: what is generated is not kept. Where max_tokens is left out, it becomes what
    leaves room.

    Raises APIError (400): what the request asks for by name is more.
    """
    asked = params.prompt_logprobs
    of_prompts = 0 if asked is None else sum(map(len, prompts)) * (asked + 1) * (params.n if echoes else 1)
    _refuse_logprobs(of_prompts, "prompt_logprobs", "shorten the prompt")
    if streams or params.logprobs is None:
        return params
    a_token = len(prompts) * params.n * (params.logprobs + 1)
    longest = state.engine.max_model_len - min(map(len, prompts))
    wanted = longest if params.max_tokens is None else min(params.max_tokens, longest)
    if params.max_tokens is None:
        fitting = max(1, (MAX_LOGPROBS - of_prompts) // a_token)
        return params if wanted <= fitting else dataclasses.replace(params, max_tokens=fitting)
    _refuse_logprobs(of_prompts + a_token * wanted, "logprobs", "lower n or max_tokens, or stream the answer")
    return params


def _refuse_logprobs(count: int, name: str, hint: str) -> None:
    if count > MAX_LOGPROBS:
        raise bad_request(
            f"the answer could have {count} log-probabilities, at most {MAX_LOGPROBS} are given: ask for fewer, {hint}",
            name,
            "answer_too_large",
        )
