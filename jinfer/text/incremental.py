"""Tokens in, text out, while a request runs: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence

from jinfer.text.streams import open_stream
from jinfer.text.tokenizer import Tokenizer


class StopFinder:
    """Finds the stop string that is complete first, and holds back text that may become one.

    Where two are complete at the same character the longer wins, so nothing of it leaks. The result does not
    depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Takes the next piece of text; returns what is safe to show, and the stop string if one ended it.

        Of the stop string itself nothing is in the returned text. `may_stop=False` lets every stop string
        that is complete within this piece pass as plain text.
        """
        seen = len(self._held)
        text = self._held + text
        if may_stop:
            end, start = len(text) + 1, 0
            for stop in self._stops:
                # What was held is known to end no stop string, so a match must end behind it.
                at = text.find(stop, max(0, seen - len(stop) + 1))
                if at >= 0 and (at + len(stop), at) < (end, start):
                    end, start = at + len(stop), at
            if end <= len(text):
                self._held = ""
                return text[:start], text[start:end]
        cut = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < cut and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            if 0 <= at < cut:
                cut = at
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """The text that was held back and became no stop string."""
        held, self._held = self._held, ""
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
