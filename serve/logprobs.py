"""Log-probabilities in the formats of the chat API, the completions API, and vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jinfer import TokenLogprobs

LOWEST = -9999.0  # JSON has no -inf; OpenAI's stand-in for "practically never"
BLOCK_FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class TokenTexts:
    """How tokens are shown: their bytes, and those bytes as text. One cache per model, at most one entry per token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "special_ids", ()))
        self._cache: dict[int, tuple[bytes, str]] = {}

    def bytes_of(self, token_id: int) -> bytes:
        return self._entry(token_id)[0]

    def text_of(self, token_id: int) -> str:
        """The token as text. Part of a character is written as OpenAI does: `bytes:\\xe2\\x82`."""
        return self._entry(token_id)[1]

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def _entry(self, token_id: int) -> tuple[bytes, str]:
        entry = self._cache.get(token_id)
        if entry is None:
            raw = self._tokenizer.token_bytes(token_id)
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            entry = self._cache[token_id] = (raw, text)
        return entry


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST


class ChatLogprobs:
    """`choices[].logprobs` of the chat API: one entry per token, with its bytes."""

    def __init__(self, texts: TokenTexts, as_ids: bool = False) -> None:
        self._texts = texts
        self._as_ids = as_ids

    def entries(self, logprobs: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
        return [
            self._entry(item.token_id, item.logprob)
            | {"top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in item.top]}
            for item in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        shown = f"token_id:{token_id}" if self._as_ids else self._texts.text_of(token_id)
        return {"token": shown, "logprob": _finite(logprob), "bytes": list(self._texts.bytes_of(token_id))}


class CompletionLogprobs:
    """`choices[].logprobs` of the completions API, fed token by token.

    text_offset counts the characters of the choice's text in front of a token. A token that ends in the middle of a
    character adds that character to no offset; the token that completes it does. Special tokens that are left out of
    the text have no length.
    """

    def __init__(self, texts: TokenTexts, count: int, skips_special: bool, as_ids: bool = False) -> None:
        self._texts = texts
        self._count = count
        self._skips_special = skips_special
        self._offset = 0
        self._as_ids = as_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def block(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], echoed: str | None = None
    ) -> dict[str, list[Any]]:
        """The four lists for these tokens, which follow those of the last call.

        echoed: for the tokens of a prompt, its text: a special token has a length if it is written there (a chat
        marker), and none if the tokenizer added it.
        """
        block: dict[str, list[Any]] = {name: [] for name in BLOCK_FIELDS}
        for token_id, item in zip(token_ids, logprobs, strict=True):
            self._settle(token_id)
            block["tokens"].append(self._name(token_id))
            block["text_offset"].append(self._offset)
            block["token_logprobs"].append(None if item is None else _finite(item.logprob))
            block["top_logprobs"].append(None if item is None else self._top(item))
            self._advance(token_id, echoed)
        return block

    def seek(self, offset: int) -> None:
        """The next token begins at `offset`."""
        self._offset = offset
        self._decoder.reset()

    def _settle(self, token_id: int) -> None:
        """Counts a character that was begun and will not be completed: it is U+FFFD in the text by now."""
        pending, _ = self._decoder.getstate()
        if pending and not 0x80 <= (self._texts.bytes_of(token_id) or b"\0")[0] < 0xC0:
            self._offset += len(self._decoder.decode(b"", final=True))

    def _advance(self, token_id: int, echoed: str | None) -> None:
        shown = not (self._skips_special and self._texts.is_special(token_id))
        if echoed is not None and self._texts.is_special(token_id):
            shown = echoed.startswith(self._texts.text_of(token_id), self._offset)
        if shown:
            self._offset += len(self._decoder.decode(self._texts.bytes_of(token_id)))

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """The alternatives and the token itself: one more than asked for, where it is not among them."""
        top: dict[str, float] = {}
        for token_id, logprob in (*item.top[: self._count], (item.token_id, item.logprob)):
            # Two tokens can have one text; the likelier, which comes first, has the name.
            top.setdefault(self._name(token_id), _finite(logprob))
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.text_of(token_id)


def prompt_logprobs(
    texts: TokenTexts, logprobs: Sequence[TokenLogprobs | None], count: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: per position, token id -> logprob, rank and text; null for the first token.

    count: how many alternatives were asked for, which may be fewer than the engine was asked to give.
    """

    def position(item: TokenLogprobs) -> dict[str, Any]:
        found = {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": texts.text_of(token_id),
            }
            for rank, (token_id, logprob) in enumerate(item.top[:count], start=1)
        }
        own = {
            "logprob": _finite(item.logprob),
            "rank": item.rank,
            "decoded_token": texts.text_of(item.token_id),
        }
        found.setdefault(str(item.token_id), own)
        return found

    return [None if item is None else position(item) for item in logprobs]
