"""Log-likelihoods of texts: where a continuation begins in the tokens, and what its tokens' log-probabilities say."""

from __future__ import annotations

from collections.abc import Sequence

from jinfer.errors import RequestError
from jinfer.request import RequestOutput, ScoreOutput
from jinfer.text import Tokenizer

Text = str | Sequence[int]


def join_pair(tokenizer: Tokenizer, prompt: Text, continuation: Text) -> tuple[list[int], int]:
    """(token ids of the whole, index of the first token that belongs to the continuation).

    Two texts are tokenized as one, as the model would see them: a token that covers the end of the prompt and the
    beginning of the continuation counts for the continuation. Where either side is token ids, they are put together.

    Raises:
      RequestError: the continuation adds no token, or nothing stands before it.
    """
    if isinstance(prompt, str) and isinstance(continuation, str):
        alone, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + continuation)
        pairs = enumerate(zip(alone, whole, strict=False))
        start = next((i for i, (a, b) in pairs if a != b), min(len(alone), len(whole)))
    else:
        head = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        is_text = isinstance(continuation, str)
        tail = tokenizer.encode(continuation, add_special_tokens=False) if is_text else list(continuation)
        whole, start = [*head, *tail], len(head)
    if start >= len(whole):
        raise RequestError("the continuation adds no token to its prompt: give some text or token ids")
    if start == 0:
        raise RequestError(
            "no token stands before the continuation, so the model says nothing about its first one: give a prompt"
        )
    return whole, start


def score_of(output: RequestOutput, start: int) -> ScoreOutput:
    """The score of the tokens from `start` on, out of a request with prompt_logprobs."""
    found = output.prompt_logprobs
    assert found is not None
    entries = [entry for entry in found[start:] if entry is not None]
    return ScoreOutput(
        prompt_token_ids=list(output.prompt_token_ids[:start]),
        token_ids=list(output.prompt_token_ids[start:]),
        logprobs=[entry.logprob for entry in entries],
        is_greedy=all(entry.rank == 1 for entry in entries),
        weights_version=output.weights_version,
    )
