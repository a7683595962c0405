"""A prompt in front of its output: the text of both together, and where each token begins in it.

A prompt of token ids may end inside a character, which the output completes. What the prompt alone decodes to is
then not what it contributes to the whole, so its uncertain end waits for the output.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jinfer.text.pieces import Kind
from jinfer.text.streams import MetaspaceStream
from jinfer.text.tokenizer import Tokenizer

_NONE: frozenset[int] = frozenset()


class Echo:
    """The part of a prompt in `tokenizer.decode(prompt + output)`.

    `text + Join(...) + output text`, with the output's text as `IncrementalDetokenizer` gives it, is that text.

    Attributes:
      alone: the prompt decoded by itself.
      text: what of it no output can change.
      held: the bytes of the prompt's last byte tokens, for tokenizers that read a run of those as a whole (metaspace):
        one byte that is not UTF-8 spoils the run, which the output may continue.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else _NONE
        self.alone = self.text = tokenizer.decode(prompt_ids, skip_special_tokens)
        self.held = b""
        self.strips = 0  # leading spaces that the text of `held` loses
        pieces = tokenizer.pieces
        if pieces.kind is Kind.METASPACE:
            end = len(prompt_ids)
            for at in range(len(prompt_ids) - 1, -1, -1):
                if prompt_ids[at] in self._skipped:
                    continue
                piece = pieces.metaspace(prompt_ids[at])
                if isinstance(piece, int):
                    self.held, end = bytes([piece]) + self.held, at
                elif piece is not None:
                    break
            prompt_ids = prompt_ids[:end]
            if self.held:
                self.text = tokenizer.decode(prompt_ids, skip_special_tokens)
                self.strips = MetaspaceStream(pieces, prompt_ids, self._skipped).strips
        elif pieces.kind is Kind.BYTE_LEVEL and _unfinished_end(tokenizer, prompt_ids, self._skipped):
            self.text = self.text.removesuffix("\ufffd")
        elif pieces.kind is Kind.OTHER:
            self.text = self.text.rstrip("\ufffd")

    def join(self) -> Join:
        """For one choice of the prompt: what stands between `text` and the output's own text."""
        return Join(self)

    def value_of(self, token_id: int) -> str | int | None:
        """A token's text or byte; None if it contributes nothing."""
        return None if token_id in self._skipped else self._tokenizer.pieces.metaspace(token_id)


class Join:
    """Waits for the end of the run of byte tokens that the prompt began.

    Attributes:
      is_open: the run goes on, so that its text is not known yet.
    """

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self._run = bytearray(echo.held)
        self.is_open = bool(echo.held)

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes output tokens; returns the prompt's part of the run once they end it."""
        for token_id in token_ids if self.is_open else ():
            piece = self._echo.value_of(token_id)
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece is not None:
                return self.finish()
        return ""

    def finish(self) -> str:
        """The prompt's part of the run, at the end of the output."""
        if not self.is_open:
            return ""
        self.is_open = False
        held = self._echo.held
        try:
            self._run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(held)
        text = held[: len(held) - len(_unfinished(held[-3:]))].decode()
        strips = self._echo.strips
        return text[:strips].lstrip(" ") + text[strips:]


class TextOffsets:
    """Where each token of a sequence begins, in characters of its decoded text.

    A token that begins inside a character has the offset of that character; special tokens that are left out of the
    text have no length.

    prompt_ids: what the sequence continues and the text does not show.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._skipped = tokenizer.special_ids if skip_special_tokens else _NONE
        self._count = 0  # characters of the text so far, without those of `_pending`
        # Bytes of an unfinished character; metaspace: of the run of byte tokens that has not ended.
        self._pending = _unfinished_end(tokenizer, prompt_ids, self._skipped)
        self._stream: MetaspaceStream | None = None
        if tokenizer.pieces.kind is Kind.METASPACE:
            self._stream = MetaspaceStream(tokenizer.pieces, prompt_ids, self._skipped)
            self._pending = self._stream.unfinished
        self._hidden = len(self._pending)  # those of the prompt, which the text does not show

    def push(self, token_id: int, echoed: str | None = None) -> int:
        """Takes the next token, returns its offset.

        echoed: for a prompt that was given as text, that text: a special token has a length if it is written there
        (a chat marker), and none if the tokenizer added it.
        """
        if echoed is not None and token_id in self._special:
            at = self._count + self._length(self._pending)
            text = self._tokenizer.token_text(token_id)
            if echoed.startswith(text, at):
                self.seek(at + len(text))
            return at
        if token_id in self._skipped:
            return self._count + (self._length(self._pending) if self._stream else 0)
        return (
            self._push_piece(token_id)
            if self._stream
            else self._push_bytes(self._tokenizer.token_bytes(token_id))
        )

    def seek(self, offset: int) -> None:
        """The next token begins at `offset`, and completes nothing."""
        self._count, self._pending, self._hidden = offset, b"", 0

    def _push_bytes(self, data: bytes) -> int:
        if not self._pending and data.isascii():  # the decoder is slow, and most tokens are plain
            self._count += len(data)
            return self._count - len(data)
        if self._pending and data and not _continues(self._pending, data[0]):
            # It is U+FFFD in the text by now; of the first two bytes of a surrogate, which Python waits with, each is.
            self._count += len(self._pending.decode("utf-8", "replace"))
            self._pending = b""
        at = self._count
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count += len(decoder.decode(self._pending + data))
        self._pending = decoder.getstate()[0]
        return at

    def _push_piece(self, token_id: int) -> int:
        assert self._stream is not None
        piece, text = self._tokenizer.pieces.metaspace(token_id), self._stream.feed(token_id)
        if isinstance(piece, int) or piece is None:
            at = self._count + self._length(self._pending)
            self._pending += b"" if piece is None else bytes([piece])
            return at
        ended = min(self._length(self._pending, is_whole=True), len(text))
        before = self._count
        self.seek(before + len(text))
        return before + ended

    def _length(self, run: bytes, is_whole: bool = False) -> int:
        """Characters of a run of byte tokens: one per byte once it is spoiled."""
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        try:
            return len(decoder.decode(run, final=is_whole))
        except UnicodeDecodeError:
            return max(0, len(run) - self._hidden)


def _unfinished_end(tokenizer: Tokenizer, ids: Sequence[int], skipped: frozenset[int]) -> bytes:
    """The bytes at the end of a byte-level text that begin a character and do not complete it."""
    tail = b""
    for token_id in reversed(ids):
        if len(tail) >= 3:
            break
        if token_id not in skipped:
            tail = tokenizer.token_bytes(token_id) + tail
    return _unfinished(tail[-3:])


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a character and do not complete it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


def _continues(pending: bytes, byte: int) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(pending + bytes([byte]))
    except UnicodeDecodeError:
        return False
    return True
