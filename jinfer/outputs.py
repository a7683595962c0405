"""From a step's tokens to what callers get: text, log-probabilities, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinfer.pooling import Pool
from jinfer.request import FinishReason, OutputDelta, Request, TokenLogprobs
from jinfer.text import IncrementalDetokenizer, Tokenizer


@dataclass(slots=True, eq=False)
class OutputStream:
    """What one running sequence has yet to tell its caller."""

    request: Request
    detokenizer: IncrementalDetokenizer
    # Filled chunk by chunk while the prompt is computed, and told with the first delta.
    prompt_logprobs: Any = None  # list[TokenLogprobs | None], if asked for
    told_prompt: bool = False
    pool: Pool | None = None  # of an embedding request, filled chunk by chunk too
    min_length: int = 0  # stop strings count only from this many tokens on
    error: str | None = None  # what went wrong, with FinishReason.ERROR

    @classmethod
    def open(cls, request: Request, tokenizer: Tokenizer, first: OutputStream | None = None) -> OutputStream:
        """first: of another choice of the same prompt, which has told nothing yet."""
        params = request.params
        if first is not None:
            detokenizer = first.detokenizer.fork()
        else:
            detokenizer = IncrementalDetokenizer(
                tokenizer,
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
            )
        stream = cls(request, detokenizer, min_length=params.min_tokens)
        if params.prompt_logprobs is not None and request.index == 0:
            stream.prompt_logprobs = [None] * request.num_prompt_tokens
        if request.pooling is not None:
            stream.pool = Pool(request.pooling)
        return stream

    def push(self, token: int) -> str:
        """The text that a token adds; a token that ended the request adds none unless asked for."""
        request = self.request
        ended_by_token = request.finish_reason is FinishReason.STOP
        if ended_by_token and not request.params.include_stop_str_in_output:
            return ""
        return self.detokenizer.push(token, may_stop=self._may_stop and not ended_by_token)

    def flush(self) -> str:
        """The text that was held back, once the request has ended."""
        text = self.detokenizer.flush(may_stop=self._may_stop)
        request = self.request
        named = request.stop_names.values() if request.params.include_stop_str_in_output else ()
        if self.detokenizer.stopped_by is None and request.stop_reason in named:
            text += str(request.stop_reason)  # the text of a special token is in no decoded text
        return text

    @property
    def _may_stop(self) -> bool:
        return len(self.request.output_token_ids) > self.min_length

    def delta(self, token_ids: list[int], text: str, logprobs: list[TokenLogprobs] | None) -> OutputDelta:
        """One delta; the first carries the prompt's log-probabilities, the last the end."""
        request = self.request
        delta = OutputDelta(
            request.request_id,
            request.index,
            token_ids,
            text,
            logprobs,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached,
            num_preemptions=request.num_preemptions,
        )
        if not self.told_prompt:
            delta.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
            self.told_prompt = True
        if request.finished:
            delta.finish_reason = request.finish_reason
            delta.stop_reason = request.stop_reason
            delta.timings = request.timings()
            delta.error = self.error
            if self.pool is not None and request.output_token_ids and not self.error:
                delta.embedding = self.pool.vector(request.num_prompt_tokens)
        return delta
