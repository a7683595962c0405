"""What a request must be before the engine takes it: its checks, its end tokens, the seeds of its choices.

Whatever passes here can be packed for the device: nothing that a caller sent is converted for the first time later.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from jinfer.errors import RequestError, shown
from jinfer.sampling.params import MAX_STOP_IDS, RANDOM_SEED, SEED_LIMIT, SamplingParams
from jinfer.schedule.scheduler import Scheduler
from jinfer.text import Tokenizer

MAX_PRIORITY = 2**63 - 1


class EndTokens(NamedTuple):
    """The tokens that end one request.

    ids: those that end it. banned: those that may not be sampled before min_tokens, the model's own ends always among
    them. names: the stop strings that are the text of a special token, by its id.
    """

    ids: frozenset[int]
    banned: frozenset[int]
    names: Mapping[int, str]


class CheckedPrompt(tuple[int, ...]):
    """A prompt whose ids are integers of the vocabulary. `Admission.check` makes it, on any thread, so that the
    engine's own need not look at each id again."""

    vocab_size = 0


class Admission:
    """Checks requests against one engine's model and memory. end_ids: the model's own end tokens."""

    def __init__(
        self, scheduler: Scheduler, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int], seed: int
    ) -> None:
        self._scheduler, self._vocab_size, self._end_ids = scheduler, vocab_size, end_ids
        added = tokenizer.added_tokens.items()
        self._special = {
            text: i for text, i in added if i in tokenizer.special_ids and 0 <= i < vocab_size and text
        }
        self._seeds = random.Random(seed)  # for requests that bring none

    def check(
        self, prompt: Sequence[int], params: SamplingParams, *, prompt_only: bool = False
    ) -> CheckedPrompt:
        """The prompt, whose ids need no check any more; `prompt_only`: see `Engine.add_request`.

        Raises:
          RequestError: a request with these could not run.
        """
        vocab = self._vocab_size
        if len(prompt) == 0:
            raise RequestError("the prompt is empty: give at least one token", param="prompt")
        if not isinstance(prompt, CheckedPrompt) or prompt.vocab_size != vocab:
            prompt = self._checked(prompt)
        scheduler = self._scheduler
        longest = scheduler.capacity_prompt_only if prompt_only else scheduler.capacity_tokens
        if len(prompt) >= longest:
            raise RequestError(
                f"prompt has {len(prompt)} tokens, max_model_len is {longest - prompt_only}: shorten it or "
                "start with a larger --max-model-len",
                param="prompt",
            )
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= vocab:
                    raise RequestError(
                        f"{name} has token id {shown(token)}, expected ids from 0 to {vocab - 1}", param=name
                    )
        if params.min_tokens > scheduler.max_model_len:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, max_model_len is {scheduler.max_model_len}: lower it",
                param="min_tokens",
            )
        count = len(self.end_tokens(params).banned)
        if count > MAX_STOP_IDS:
            raise RequestError(
                f"{count} end tokens, at most {MAX_STOP_IDS} fit: use fewer stop_token_ids",
                param="stop_token_ids",
            )
        return prompt

    def _checked(self, prompt: Sequence[int]) -> CheckedPrompt:
        ids, vocab = CheckedPrompt(prompt), self._vocab_size
        # In C where all is well: a loop over 131,072 ids takes ten times as long.
        if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab:
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                    raise RequestError(
                        f"prompt has token id {shown(token)}, expected integers from 0 to {vocab - 1}",
                        param="prompt",
                    )
        ids.vocab_size = vocab
        return ids

    def end_tokens(self, params: SamplingParams) -> EndTokens:
        """The tokens that end a request with these parameters."""
        # Special tokens are left out of the text, so a stop string could never match one there.
        texts = params.stop if params.skip_special_tokens else ()
        names = {self._special[text]: text for text in texts if text in self._special}
        asked = frozenset(params.stop_token_ids) | names.keys()
        every = asked | self._end_ids
        return EndTokens(asked if params.ignore_eos else every, every, names)

    def seed(self, params: SamplingParams) -> int:
        """The seed of a request's first choice."""
        if params.seed is None or params.seed == RANDOM_SEED:
            return self._seeds.getrandbits(63)
        return params.seed


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`: the first has the request's own, the others a hash, so that the streams of
    neighbouring seeds never meet as sums would (10 + 1 = 11 + 0)."""
    if index == 0:
        return seed
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8, person=b"choice").digest()
    return int.from_bytes(digest, "little") - SEED_LIMIT


def read_priority(priority: Any) -> int:
    """A priority as an int; integers of other kinds (numpy's) are taken.

    Raises:
      RequestError: it is no integer, or beyond 64 bits.
    """
    try:
        value = operator.index(priority)
    except TypeError:
        value = None
    if value is None or isinstance(priority, bool) or abs(value) > MAX_PRIORITY:
        raise RequestError(
            f"priority is {shown(priority)}, expected an integer of at most 64 bits", param="priority"
        )
    return value


def check_salt(cache_salt: Any) -> None:
    """Raises RequestError for a cache salt that is no string."""
    if not isinstance(cache_salt, str):
        raise RequestError(f"cache_salt is {shown(cache_salt)}, expected a string", param="cache_salt")
