"""Encodes a text in which marks say what must not become a special token (see `special_text.py`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import tokenizers

from jinfer.errors import RequestError

if TYPE_CHECKING:
    from jinfer.text.tokenizer import Tokenizer

_SECTION = (
    "\U000143fe"  # stands for the added token before a stretch; it is in no text that is encoded with it
)


class ProtectedEncoder:
    """The marked texts of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        added = tokenizer.backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        # What a vocabulary has no word for is ordinary text too, though its token counts as special.
        model = self._backend.model
        unknown = {
            getattr(model, "unk_id", None),
            self._backend.token_to_id(getattr(model, "unk_token", None) or ""),
        }
        self._forbidden = frozenset(i for i, token in added.items() if token.special and i not in unknown)
        self.ignores_case = self._backend.normalizer is not None and any(
            token.special and token.normalized for token in added.values()
        )
        # Their texts are looked for in what the normalizer makes of a text, so other characters may spell them too.
        self._has_spellings = self._backend.normalizer is not None and any(
            added[i].normalized for i in self._forbidden
        )
        # A tokenizer that splits special tokens anyway has nothing to protect.
        splits = bool(self._backend.encode_special_tokens)
        self.special_texts = [] if splits else sorted(t.content for t in added.values() if t.special)

    def spellings(self, value: Any) -> list[str]:
        """Texts in the strings of a value (of JSON's types) that the tokenizer takes for special tokens because its
        normalizer makes them so: full-width letters where it applies NFKC."""
        if not self._has_spellings or not self.special_texts:
            return []
        texts = list(_strings(value))
        found = set()
        for text, encoding in zip(texts, self._backend.encode_batch(texts, add_special_tokens=False)):
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in self._forbidden:
                    found.add(text[start:end])
        return sorted(found - {""} - set(self.special_texts))

    @functools.cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        """The same model without its added tokens: whatever it reads is ordinary text."""
        made = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            made.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            made.pre_tokenizer = self._backend.pre_tokenizer
        made.add_tokens([tokenizers.AddedToken(_SECTION, normalized=False)])
        return made

    def encode(self, text: str, mark: str, add_special_tokens: bool) -> list[int]:
        """The ids of a marked text, without the marks.

        The marked text is encoded as it is: marks break the texts they stand in, so that every special token found is
        the template's own. Between added tokens stand stretches that are encoded independently of one another; those
        with a mark are encoded again without it, as ordinary text.

        Raises:
          RequestError: the model has no other tokens for a text than the special one.
        """
        encoding = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = []
        pending: list[int] = []  # of the stretch so far
        begin = 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token not in self._added or (start, end) == (0, 0):
                if (start, end) == (0, 0) and token in self._added:
                    ids += self._stretch(text, begin, begin, mark, pending)
                    pending = []
                    ids.append(token)
                else:
                    pending.append(token)
                continue
            ids += self._stretch(text, begin, start, mark, pending)
            ids.append(token)
            pending, begin = [], end
        return ids + self._stretch(text, begin, len(text), mark, pending)

    def _stretch(self, text: str, begin: int, end: int, mark: str, ids: list[int]) -> list[int]:
        stretch = text[begin:end]
        if mark not in stretch:
            return ids
        found = self._plain(stretch.replace(mark, ""), begin > 0)
        if not self._forbidden.isdisjoint(found):
            # Some vocabularies hold special tokens among their words: cut where the marks are.
            pieces = [piece for piece in stretch.split(mark) if piece]
            found = [i for n, piece in enumerate(pieces) for i in self._plain(piece, begin > 0 or n > 0)]
        if not self._forbidden.isdisjoint(found):
            raise RequestError(
                "a message holds the text of a special token, and this model's tokenizer has no ordinary tokens for it: "
                "remove it",
                "messages",
            )
        return found

    def _plain(self, text: str, follows: bool) -> list[int]:
        """The ids of an ordinary text; `follows` another one, so that it gets no space that only a beginning gets."""
        if not text:
            return []
        if not follows:
            return self._ordinary.encode_batch([text], add_special_tokens=False)[0].ids
        return self._ordinary.encode_batch([_SECTION + text], add_special_tokens=False)[0].ids[1:]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
