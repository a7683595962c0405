"""Requests that are large in one way each, all within the largest body that a server takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Case:
    """One kind of request. `at_once` of them are sent together, each over its own connection."""

    name: str
    path: str
    make_body: Callable[[int], bytes]  # from the largest size in bytes
    at_once: int = 1


def _filled(head: bytes, unit: bytes, tail: bytes, size: int) -> bytes:
    """head, as many units as fit into `size` bytes, tail."""
    return head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def _prompt(size: int) -> bytes:
    return _filled(b'{"max_tokens": 1, "prompt": "', b"once upon a time ", b'"}', size)


def _digits(size: int) -> bytes:
    return _filled(b'{"max_tokens": 1, "prompt": "', b"0123456789", b'"}', size)


def _unbroken(size: int) -> bytes:
    return _filled(b'{"max_tokens": 1, "prompt": "', b"a", b'"}', size)


def _keys(size: int) -> bytes:
    count = min(350_000, size // 12)
    keys = b",".join(b'"k%d":1' % i for i in range(count))
    return b'{"prompt": "x", "stream": true, "stream_options": {' + keys + b"}}"


def _bias(size: int) -> bytes:
    entries = b",".join(b'"%d":1' % i for i in range(size // 11))
    return b'{"prompt": "x", "logit_bias": {' + entries + b"}}"


def _ids(size: int) -> bytes:
    return _filled(b'{"max_tokens": 1, "prompt": [', b"901,", b"1]}", size)


def _stop_ids(size: int) -> bytes:
    return _filled(b'{"prompt": "x", "stop_token_ids": [', b"7,", b"7]}", size)


def _temperatures(size: int) -> bytes:
    return _filled(b'{"prompt": "x", "temperature": [', b"0.5,", b"1]}", size)


def _prompts(size: int) -> bytes:
    return _filled(b'{"max_tokens": 1, "prompt": [', b'"a",', b'"a"]}', size)


def _lists(size: int) -> bytes:
    return _filled(b'{"messages": [', b"[],", b"[]]}", size)


def _messages(size: int) -> bytes:
    return _filled(
        b'{"messages": [', b'{"role":"user","content":"a"},', b'{"role":"user","content":"a"}]}', size
    )


def _log_probabilities(size: int, stream: bool = False) -> bytes:
    asked = {
        "prompt": "Once",
        "n": 64,
        "max_tokens": 200,
        "ignore_eos": True,
        "logprobs": 20,
        "stream": stream,
    }
    return json.dumps(asked).encode()


def _chat_log_probabilities(size: int) -> bytes:
    asked = {"n": 64, "max_tokens": 200, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    return json.dumps(asked | {"messages": [{"role": "user", "content": "Hi"}]}).encode()


def _nested_tools(size: int) -> bytes:
    nested = b'{"a":' * 190 + b"1" + b"}" * 190
    tool = b'{"type": "function", "function": {"name": "f", "parameters": ' + nested + b"}},"
    head = b'{"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "none", "tools": ['
    return _filled(head, tool, tool[:-1] + b"]}", size)


def _detokenized(size: int) -> bytes:
    return _filled(b'{"tokens": [', b"901,", b"901]}", size)


CASES = (
    Case("prompt", COMPLETIONS, _prompt),
    Case("digits", COMPLETIONS, _digits),
    Case("one long word", COMPLETIONS, _unbroken),
    Case("350,000 keys", COMPLETIONS, _keys),
    Case("logit_bias", COMPLETIONS, _bias),
    Case("stop_token_ids", COMPLETIONS, _stop_ids),
    Case("temperatures", COMPLETIONS, _temperatures),
    Case("token ids", COMPLETIONS, _ids),
    Case("prompts", COMPLETIONS, _prompts),
    Case("empty lists", CHAT, _lists),
    Case("messages", CHAT, _messages),
    Case("nested tools", CHAT, _nested_tools),
    Case("n=64, log-probabilities", COMPLETIONS, _log_probabilities),
    Case("the same as a chat", CHAT, _chat_log_probabilities),
    Case("the same, streamed", COMPLETIONS, lambda size: _log_probabilities(size, stream=True)),
    Case("/tokenize", "/tokenize", _prompt),
    Case("/tokenize digits", "/tokenize", _digits),
    Case("/detokenize", "/detokenize", _detokenized),
    Case("16 prompts at once", COMPLETIONS, _prompt, at_once=16),
    Case("16 of empty lists", CHAT, _lists, at_once=16),
)
