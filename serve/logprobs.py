"""Log-probabilities in the formats of the chat API, the completions API, and vLLM's prompt_logprobs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jinfer import TokenLogprobs
from serve.jsonpieces import Encoded, Long, dumps

LOWEST = -9999.0  # JSON has no -inf; OpenAI's stand-in for "practically never"
BLOCK_FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class TokenTexts:
    """How tokens are shown: their bytes, and those bytes as text. One cache per model, at most one entry per token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, tuple[bytes, str]] = {}

    def bytes_of(self, token_id: int) -> bytes:
        return self._entry(token_id)[0]

    def text_of(self, token_id: int) -> str:
        """The token as text. Part of a character is written as OpenAI does: `bytes:\\xe2\\x82`."""
        return self._entry(token_id)[1]

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


NULL = Encoded("null")


class ChatLogprobs:
    """`choices[].logprobs` of the chat API: one entry per token, with its bytes.

    Answers hold twenty entries a token, so what does not change is encoded once for each token of the vocabulary.
    """

    def __init__(self, texts: TokenTexts, as_ids: bool = False) -> None:
        self._texts = texts
        self._as_ids = as_ids
        self._known: dict[int, tuple[str, str]] = {}  # token id -> JSON in front of and behind its logprob

    def entries(self, logprobs: Iterable[TokenLogprobs]) -> Iterator[Encoded]:
        """JSON of one entry per token."""
        for item in logprobs:
            top = "},".join(
                [self._entry(token_id, logprob) for token_id, logprob in zip(item.top_ids, item.top_logprobs)]
            )
            end = "}]}" if top else "]}"
            yield Encoded(f'{self._entry(item.token_id, item.logprob)},"top_logprobs":[{top}{end}')

    def _entry(self, token_id: int, logprob: float) -> str:
        """An entry without its closing brace."""
        around = self._known.get(token_id)
        if around is None:
            shown = f"token_id:{token_id}" if self._as_ids else self._texts.text_of(token_id)
            data = dumps(list(self._texts.bytes_of(token_id)))
            around = f'{{"token":{dumps(shown, ascii=True)},"logprob":', f',"bytes":{data}'
            self._known[token_id] = around
        return f"{around[0]}{_finite(logprob)!r}{around[1]}"


class CompletionLogprobs:
    """`choices[].logprobs` of the completions API, fed token by token.

    offsets: finds the `text_offset` of each token, see `jinfer.text.echo.TextOffsets`.
    """

    def __init__(self, texts: TokenTexts, count: int, offsets: Any, as_ids: bool = False) -> None:
        self._texts = texts
        self._count = count
        self._offsets = offsets
        self._as_ids = as_ids
        self._keys: dict[int, str] = {}  # token id -> its name as a key in JSON

    def block(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], echoed: str | None = None
    ) -> dict[str, list[Any]]:
        """The four lists for these tokens, which follow those of the last call; top_logprobs as Encoded.

        echoed: for the tokens of a prompt that was given as text, that text.
        """
        block: dict[str, list[Any]] = {name: [] for name in BLOCK_FIELDS}
        for token_id, item in zip(token_ids, logprobs, strict=True):
            block["tokens"].append(self._name(token_id))
            block["text_offset"].append(self._offsets.push(token_id, echoed))
            block["token_logprobs"].append(None if item is None else _finite(item.logprob))
            block["top_logprobs"].append(NULL if item is None else self._top(item))
        return block

    def seek(self, offset: int) -> None:
        """The next token begins at `offset`."""
        self._offsets.seek(offset)

    def _top(self, item: TokenLogprobs) -> Encoded:
        """The alternatives and the token itself: one more than asked for, where it is not among them."""
        top: dict[str, float] = {}
        for token_id, logprob in (*item.top[: self._count], (item.token_id, item.logprob)):
            key = self._keys.get(token_id)
            if key is None:
                key = self._keys[token_id] = dumps(self._name(token_id), ascii=True)
            # Two tokens can have one text; the likelier, which comes first, has the name.
            top.setdefault(key, logprob)
        return Encoded("{" + ",".join([f"{key}:{_finite(value)!r}" for key, value in top.items()]) + "}")

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.text_of(token_id)


def prompt_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprobs | None], count: int) -> Long:
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

    return Long(NULL if item is None else Encoded(dumps(position(item))) for item in logprobs)
