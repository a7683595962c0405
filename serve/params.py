"""From the fields of a request to SamplingParams."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinfer import RequestError, SamplingParams
from serve.protocol import APIError, bad_request
from serve.schemas import ChatBody, CompletionBody, EmbeddingBody, SamplingBody, StreamOptions

# Same name and meaning in the request and in SamplingParams.
PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat answer may go on to the model's length
MAX_PRIORITY = 2**31 - 1
MAX_SALT = 1024
REQUEST_ID = re.compile(r"[!-~]{1,128}")  # it is written into a header


@dataclass(frozen=True)
class Limits:
    """What the server's settings say about a request."""

    max_logprobs: int
    uses_priority: bool  # the scheduler orders by priority


def chat_params(body: ChatBody, defaults: Mapping[str, Any], limits: Limits) -> SamplingParams:
    """Raises APIError (400) naming the field at fault."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    wanted = None
    if body.logprobs:
        wanted = body.top_logprobs or 0
        _check_logprobs(wanted, "top_logprobs", limits)
    both = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(both) == 2:
        raise bad_request(
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}: give one",
            "max_completion_tokens",
        )
    max_tokens = both.pop() if both else _default_max_tokens(defaults)
    return _params(body, defaults, limits, max_tokens=max_tokens, logprobs=wanted)


def completion_params(body: CompletionBody, defaults: Mapping[str, Any], limits: Limits) -> SamplingParams:
    """Raises APIError (400) naming the field at fault.

    `echo` with logprobs asks for the prompt's too. max_tokens 0 asks for none of the output: the engine makes one
    token, and the endpoint leaves it out.
    """
    prompt_logprobs = body.prompt_logprobs
    if body.logprobs is not None:
        _check_logprobs(body.logprobs, "logprobs", limits)
        if body.echo:
            prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = _default_max_tokens(defaults) or DEFAULT_COMPLETION_TOKENS
    return _params(
        body,
        defaults,
        limits,
        max_tokens=1 if max_tokens == 0 else max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _params(body: SamplingBody, defaults: Mapping[str, Any], limits: Limits, **given: Any) -> SamplingParams:
    _check_common(body, limits)
    values = {name: defaults[name] for name in PLAIN if defaults.get(name) is not None}
    values |= {name: value for name in PLAIN if (value := getattr(body, name)) is not None}
    values |= {name: value for name, value in given.items() if value is not None or name == "max_tokens"}
    if values.get("stop") == "":
        del values["stop"]
    if body.logit_bias:
        values["logit_bias"] = _read_logit_bias(body.logit_bias)
    try:
        return SamplingParams(**values)
    except RequestError as error:
        raise _renamed(error, body) from error


def _check_common(body: SamplingBody, limits: Limits) -> None:
    if body.prompt_logprobs is not None:
        _check_logprobs(body.prompt_logprobs, "prompt_logprobs", limits)
        if body.stream:
            raise bad_request("prompt_logprobs cannot be streamed: ask without stream", "prompt_logprobs")
    if body.stream_options is not None:
        if not body.stream and any(body.stream_options.model_dump().values()):
            raise bad_request("stream_options needs stream: true", "stream_options")
        if body.stream_options.include_obfuscation:
            raise bad_request(
                "stream_options.include_obfuscation is not supported: remove it",
                "stream_options",
                "unsupported_field",
            )
    check_queueing(body, limits)


def check_queueing(body: SamplingBody | EmbeddingBody, limits: Limits) -> None:
    """Raises APIError (400) for a priority or cache salt that cannot act."""
    if body.priority:
        if not limits.uses_priority:
            raise bad_request(
                f"priority is {body.priority}, and this server takes requests in order of arrival: leave it out, or "
                "start the server with --scheduling-policy priority",
                "priority",
            )
        if abs(body.priority) > MAX_PRIORITY:
            raise bad_request(
                f"priority is {body.priority}, expected at most {MAX_PRIORITY} in size", "priority"
            )
    if body.cache_salt is not None and not 0 < len(body.cache_salt) <= MAX_SALT:
        raise bad_request(
            f"cache_salt has {len(body.cache_salt)} characters, expected 1 to {MAX_SALT}", "cache_salt"
        )


def answer_id(prefix: str, given: str | None) -> str:
    """The id of an answer, with the request's own id in it if it brings one. Raises APIError (400) for a bad one."""
    if not given:
        return f"{prefix}-{uuid.uuid4().hex}"
    if not REQUEST_ID.fullmatch(given):
        raise bad_request(
            f"request_id is {given[:60]!r}: expected 1 to 128 printable ASCII characters without spaces",
            "request_id",
        )
    return f"{prefix}-{given}"


def _check_logprobs(value: int, name: str, limits: Limits) -> None:
    if not 0 <= value <= limits.max_logprobs:
        raise bad_request(f"{name} is {value}, expected 0 to {limits.max_logprobs}", name)


def _default_max_tokens(defaults: Mapping[str, Any]) -> int | None:
    return defaults.get("max_tokens")


def _read_logit_bias(value: Any) -> dict[int, float]:
    """JSON keys are strings; the ids and the numbers are checked by SamplingParams."""
    if not isinstance(value, dict):
        raise bad_request(
            "logit_bias is not an object: expected token id -> number from -100 to 100", "logit_bias"
        )
    bias = {}
    for key, number in value.items():
        # int() would take " 5", "+5" and "5_0" as well.
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise bad_request(f"logit_bias has the key {key[:60]!r}, expected a token id", "logit_bias")
        bias[int(key)] = number
    return bias


def _renamed(error: RequestError, body: SamplingBody) -> APIError:
    """The engine's error in the words of the request: a chat may say max_completion_tokens for max_tokens."""
    message, param = str(error), error.param
    if param == "max_tokens" and isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        message, param = message.replace("max_tokens", "max_completion_tokens", 1), "max_completion_tokens"
    return bad_request(message, param)


def force_usage(body: ChatBody | CompletionBody) -> None:
    """Makes a stream end with its usage, whatever the client asked."""
    if body.stream:
        options = body.stream_options or StreamOptions()
        body.stream_options = options.model_copy(update={"include_usage": True})
