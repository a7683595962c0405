"""Tokens in, text out, while a request runs: whole characters only, and never a part of a stop string."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from jinfer.text.streams import open_stream
from jinfer.text.tokenizer import Tokenizer


class _Match:
    """How far the text has come in one stop string: `length`, the longest beginning of it that the text ends with.

    Knuth, Morris and Pratt's way: borders[n] is the length of the longest proper beginning of the first n characters
    that they also end with. It is filled only as far as a match has come, so that a token costs as many steps as it has
    characters, however long the stop string.
    """

    __slots__ = ("_borders", "first", "length", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.first = stop[0]
        self.length = 0
        self._borders = [0, 0]

    def advance(self, text: str, at: int) -> int:
        """Reads text[at:] up to the first character that completes the stop string; returns the place behind that
        character, or -1 if none does."""
        stop, length, size = self.stop, self.length, len(text)
        if length and size - at < len(stop) - length and stop.startswith(text[at:], length):
            self.length = length + size - at
            return -1
        while at < size:
            if not length:
                at = text.find(self.first, at)
                if at < 0:
                    break
                length = 1
            else:
                while length and stop[length] != text[at]:
                    length = self._border(length)
                length += stop[length] == text[at]
            at += 1
            if length == len(stop):
                self.length = self._border(length)
                return at
        self.length = length
        return -1

    def _border(self, length: int) -> int:
        """borders[length], and all before it, once a match has come so far."""
        borders, stop = self._borders, self.stop
        while len(borders) <= length:
            last, border = stop[len(borders) - 1], borders[-1]
            while border and stop[border] != last:
                border = borders[border]
            borders.append(border + (stop[border] == last))
        return borders[length]


class StopFinder:
    """Finds the stop string that is complete first, and holds back text that may become one.

    Where two are complete at the same character the longer wins, so nothing of it leaks. The result does not
    depend on how the text is cut into pieces. A piece costs time in proportion to its own length, not to that of the
    stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matches = tuple(_Match(stop) for stop in dict.fromkeys(stops))
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes the next piece of text; returns what is safe to show, and the stop string if one ended it.

        Of the stop string itself nothing is in the returned text. `may_stop=False` lets every stop string
        that is complete within this piece pass as plain text.
        """
        end, stop, longest = len(text) + 1, "", 0
        for match in self._matches:
            if match.length or match.first in text:
                at = match.advance(text, 0)
                if may_stop and (0 <= at < end or (at == end and len(match.stop) > len(stop))):
                    end, stop = at, match.stop
                while at >= 0 and not may_stop:
                    at = match.advance(text, at)
                longest = max(longest, match.length)
        if stop:
            text = self.finish() + text[:end]
            return text[: len(text) - len(stop)], stop
        text = self._held + text
        cut = len(text) - longest
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """The text that was held back and became no stop string."""
        held, self._held = self._held, ""
        for match in self._matches:
            match.length = 0
        return held


class IncrementalDetokenizer:
    """The text of one running sequence.

    The text given out, joined, is `tokenizer.decode` of the output as a continuation of the prompt, cut at
    the first stop string. Push every output token in order, except a stop token that the text shall not show.

    Args:
      tokenizer: the model's.
      prompt_ids: what the output continues. It decides whether a first token keeps its leading space, and an
        unfinished character at its end is completed by the output.
      skip_special_tokens: leaves special tokens out of the text.
      stop: stop strings, none empty.
      include_stop_str_in_output: the text ends with the stop string, not in front of it.

    Attributes:
      text: everything given out so far.
      stopped_by: the stop string that ended the text, None while none has.
      decoded_length: characters decoded so far, held ones included: the text offset of the next token.
    """

    __slots__ = ("_finder", "_includes_stop", "_parts", "_stream", "decoded_length", "stopped_by")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
    ) -> None:
        self._stream = open_stream(tokenizer, prompt_ids, skip_special_tokens)
        self._finder = StopFinder(stop) if stop else None
        self._includes_stop = include_stop_str_in_output
        self._parts: list[str] = []
        self.stopped_by: str | None = None
        self.decoded_length = 0

    def fork(self) -> IncrementalDetokenizer:
        """The same for another choice of the prompt, which is not read a second time."""
        other = copy.copy(self)
        other._stream = self._stream.fork()
        other._finder = copy.deepcopy(self._finder)
        other._parts = list(self._parts)
        return other

    @property
    def text(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Takes the next token and returns the text it adds, often less or more than the token's own.

        Args:
          token_id: the next output token.
          may_stop: False while stop strings do not act yet (`min_tokens`).
        """
        if self.stopped_by is not None:
            return ""
        return self._give(self._stream.feed(token_id), may_stop)

    def flush(self, may_stop: bool = True) -> str:
        """Returns what was held back, at the end of the output; an unfinished character becomes U+FFFD."""
        if self.stopped_by is not None:
            return ""
        delta = self._give(self._stream.finish(), may_stop)
        if self._finder is not None and self.stopped_by is None:
            rest = self._finder.finish()
            if rest:
                self._parts.append(rest)
                delta += rest
        return delta

    def _give(self, text: str, may_stop: bool) -> str:
        if not text:
            return ""
        self.decoded_length += len(text)
        if self._finder is not None:
            text, self.stopped_by = self._finder.feed(text, may_stop)
            if self.stopped_by is not None and self._includes_stop:
                text += self.stopped_by
        if text:
            self._parts.append(text)
        return text
