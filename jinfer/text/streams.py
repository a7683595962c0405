"""Token by token decoding: what comes out, joined, is what decoding the whole sequence gives.

A stream gives out text only when no later token can change it. It continues a prompt: what a token looks like
in the middle of a text (a leading space, the second half of a character) is kept, so prompt and output join.
"""

import codecs
import copy
from collections.abc import Sequence
from typing import Protocol, Self

from jinfer.text.pieces import Kind, Pieces
from jinfer.text.tokenizer import Tokenizer, clean_up

_NONE: frozenset[int] = frozenset()
# A character has at most 4 bytes, so at most 3 of an unfinished one can be waiting.
_UNFINISHED = 3
# Tokens of context that a decoder unknown to us sees of the prompt.
_CONTEXT = 8
_KEPT = 64  # tokens that such a decoder is given again with each further one, at most
_CLEANED = frozenset(" .?!,'ntmsver")


class Stream(Protocol):
    def feed(self, token_id: int) -> str:
        """The text that this token makes certain."""
        ...

    def finish(self) -> str:
        """The text that was waiting for more tokens."""
        ...

    def fork(self) -> Self:
        """A stream of its own that goes on from here. Opening one reads the prompt, and that may be long."""
        ...


def open_stream(tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Stream:
    """A stream of text that continues `prompt_ids`."""
    skipped = tokenizer.special_ids if skip_special_tokens else _NONE
    if tokenizer.pieces.kind is Kind.BYTE_LEVEL:
        stream: Stream = ByteLevelStream(tokenizer.pieces, prompt_ids, skipped)
    elif tokenizer.pieces.kind is Kind.METASPACE:
        stream = MetaspaceStream(tokenizer.pieces, prompt_ids, skipped)
    else:
        stream = WholeStream(tokenizer, prompt_ids, skip_special_tokens)
    return CleaningStream(stream) if tokenizer.cleans_up_spaces else stream


class ByteLevelStream:
    """All tokens' bytes together, read as UTF-8; what can never be a character becomes U+FFFD at once."""

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._piece = pieces.byte_level
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= _UNFINISHED:
                break
            if token_id not in skipped:
                tail = self._piece(token_id) + tail
        self._utf8.decode(tail[-_UNFINISHED:])
        self._is_waiting = bool(self._utf8.getstate()[0])

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        # Most pieces are plain ASCII between whole characters: for those the decoder, which is slow, need not run.
        if piece.isascii() and not self._is_waiting:
            return piece.decode("ascii")
        text = self._utf8.decode(piece)
        self._is_waiting = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def fork(self) -> Self:
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        other._utf8.setstate(self._utf8.getstate())
        return other


class MetaspaceStream:
    """Sentencepiece text. A run of byte tokens waits for its end: one wrong byte spoils the whole run."""

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int], skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._is_first = True
        self._strips = pieces.strips  # spaces that the text's beginning may still lose
        self._run = bytearray()
        self._run_from_prompt = 0
        for token_id in prompt_ids:
            if not self._is_first and not self._strips:
                break
            self.feed(token_id)
        if self._run and self._strips:  # a prompt of byte tokens alone
            self._strip(self._end_run())
        self._run = bytearray(self._begun_run(prompt_ids))
        self._run_from_prompt = len(self._run)

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces.first_metaspace(token_id) if self._is_first else self._pieces.metaspace(token_id)
        if piece is None:
            return ""
        self._is_first = False
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        if self._run:
            piece = self._end_run() + piece
        return self._strip(piece) if self._strips else piece

    def finish(self) -> str:
        return self._strip(self._end_run())

    def fork(self) -> Self:
        other = copy.copy(self)
        other._run = bytearray(self._run)
        return other

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * (len(self._run) - self._run_from_prompt)
        self._run.clear()
        self._run_from_prompt = 0
        return text

    def _strip(self, text: str) -> str:
        spaces = 0
        while spaces < min(self._strips, len(text)) and text[spaces] == " ":
            spaces += 1
        self._strips = self._strips - spaces if spaces == len(text) else 0
        return text[spaces:]

    @property
    def strips(self) -> int:
        """Spaces that the next text loses, because it begins the whole."""
        return self._strips

    @property
    def unfinished(self) -> bytes:
        """The bytes of a run of byte tokens that has not ended."""
        return bytes(self._run)

    def _begun_run(self, prompt_ids: Sequence[int]) -> bytes:
        """What the prompt's last byte tokens leave for the output to complete."""
        run = bytearray()
        for token_id in reversed(prompt_ids):
            piece = None if token_id in self._skipped else self._pieces.metaspace(token_id)
            if isinstance(piece, str):
                break
            if piece is not None:
                run.append(piece)
        utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            utf8.decode(bytes(reversed(run)))
        except UnicodeDecodeError:  # the run is spoiled, whatever follows, and one such byte says so
            return b"\xff"
        return utf8.getstate()[0]


class WholeStream:
    """Decodes the last tokens again with every further one: for decoders whose rules only the library knows."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._decode = tokenizer.backend.decode
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._given = self._text().rstrip("\ufffd")  # part of a character, which the output may complete

    def _text(self) -> str:
        return self._decode(self._ids, skip_special_tokens=self._skip)

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._text()
        certain = text.rstrip("\ufffd")
        if len(certain) <= len(self._given) or not certain.startswith(self._given):
            return ""
        delta = certain[len(self._given) :]
        self._given = certain
        if len(self._ids) > _KEPT and certain == text:
            self._forget()
        return delta

    def _forget(self) -> None:
        """Lets go of all tokens but the last ones, if those say the same without the others."""
        ids, given = self._ids, self._given
        self._ids = ids[-_CONTEXT:]
        self._given = self._text()
        if not given.endswith(self._given) or not self._given:
            self._ids, self._given = ids, given

    def finish(self) -> str:
        return self._text()[len(self._given) :]

    def fork(self) -> Self:
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other


class CleaningStream:
    """Another stream's text without the spaces before punctuation, as `clean_up` gives it for the whole."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._held = ""

    def feed(self, token_id: int) -> str:
        held = self._held + self._stream.feed(token_id)
        # No rule of clean_up spans a character that none of them contains, so the text may be cut behind it.
        cut = len(held)
        while cut and held[cut - 1] in _CLEANED:
            cut -= 1
        self._held = held[cut:]
        return clean_up(held[:cut])

    def finish(self) -> str:
        held, self._held = self._held + self._stream.finish(), ""
        return clean_up(held)

    def fork(self) -> Self:
        other = copy.copy(self)
        other._stream = self._stream.fork()
        return other
