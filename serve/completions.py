"""POST /v1/completions"""

from __future__ import annotations

import time
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from jinfer import OutputDelta, SamplingParams
from serve.answer import Plan, event, long_event
from serve.bounds import bounded_params
from serve.generation import Choice, Choices, Job
from serve.inputs import Prompt, read_prompts
from serve.jsonpieces import Long
from serve.logprobs import BLOCK_FIELDS, CompletionLogprobs, TokenTexts, prompt_logprobs
from serve.params import answer_id, completion_params, force_usage
from serve.protocol import bad_request
from serve.schemas import CompletionBody
from serve.state import State

LONG_PROMPT = 4096  # characters; encoding that many takes about a millisecond, a thread's hop a tenth of that


def is_quick_completion(fields: dict[str, Any]) -> bool:
    """Whether `plan_completion` takes a millisecond at most."""
    prompt = fields.get("prompt")
    return isinstance(prompt, str) and len(prompt) < LONG_PROMPT


def plan_completion(state: State, fields: dict[str, Any]) -> Plan:
    """What a completion request asks for. Raises APIError or RequestError for a request at fault."""
    body = CompletionBody.read(fields)
    state.check_model(body.model)
    if state.config.enable_force_include_usage:
        force_usage(body)
    params = completion_params(body, state.engine.default_params, state.limits)
    prompts = read_prompts(body.prompt)
    most = state.engine.config.max_num_waiting
    if len(prompts) * params.n > most:
        raise bad_request(
            f"the request has {len(prompts)} prompts and n {params.n}, more than this server queues ({most}): split it",
            "prompt",
        )
    adds = body.add_special_tokens is not False
    ids = [prompt if isinstance(prompt, list) else state.encode(prompt, adds, "prompt") for prompt in prompts]
    params = bounded_params(state, ids, params, streams=bool(body.stream), echoes=bool(body.echo))
    checked = [state.validate(each, params, "prompt") for each in ids]
    job = Job(answer_id("cmpl", body.request_id), checked, params, body.priority or 0, body.cache_salt or "")
    tokenizer = state.engine.tokenizer
    echoed = [_echo(prompt, tokenizer, params) for prompt in prompts] if body.echo else None
    form = CompletionFormat(body, job, echoed, state.model_name, tokenizer, state.token_texts)
    return Plan(job, form, "completion", bool(body.stream))


def _echo(prompt: Prompt, tokenizer: Any, params: SamplingParams) -> Any:
    """A prompt given as text, or for token ids `jinfer.text.echo.Echo`: they may end inside a character."""
    return prompt if isinstance(prompt, str) else tokenizer.echo(prompt, params.skip_special_tokens)


class CompletionFormat:
    """The bodies and events of one completion answer.

    echoed: the prompts, to stand in front of each choice: text, or an Echo of token ids. None without echo.
    """

    def __init__(
        self,
        body: CompletionBody,
        job: Job,
        echoed: list[Any] | None,
        model: str,
        tokenizer: Any,
        texts: TokenTexts,
    ) -> None:
        self._id = job.request_id
        self._created = int(time.time())
        self._model = model
        self._job = job
        self._echoed = echoed
        self._tokenizer = tokenizer
        self._texts = texts
        self._wants_logprobs = body.logprobs is not None
        self._count = body.logprobs or 0
        self._as_ids = bool(body.return_tokens_as_token_ids)
        self._returns_ids = bool(body.return_token_ids)
        self._prompt_logprobs = body.prompt_logprobs
        self._is_silent = body.max_tokens == 0  # the one token that the engine had to make is not shown
        options = body.stream_options
        self._counts_usage = bool(options and options.include_usage)
        self._counts_always = bool(options and options.continuous_usage_stats and options.include_usage)
        self._begun: set[int] = set()
        self._readers: dict[int, CompletionLogprobs] = {}
        self._joins: dict[
            int, Any
        ] = {}  # of choices whose echo ends inside a character that is not there yet
        # Prompt logprobs come once per prompt, and each of its choices echoes them.
        self._found: dict[int, list[Any]] = {}
        head = event(self._chunk_fields())
        self._before = head[: -len(b"}\n\n")] + b',"choices":[{"index":'
        self._after = b',"logprobs":null,"finish_reason":null}]'
        self._after += b',"usage":null}\n\n' if self._counts_usage else b"}\n\n"
        self._is_plain = not (
            self._wants_logprobs or self._returns_ids or self._counts_always or self._is_silent
        )

    def whole(self, choices: Choices) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": (self._whole_choice(i, choice, choices) for i, choice in enumerate(choices.all)),
            "usage": self._usage(choices),
            "service_tier": None,
            "system_fingerprint": None,
        }

    def _whole_choice(self, index: int, choice: Choice, choices: Choices) -> dict[str, Any]:
        prompt = index // self._job.params.n
        # The first choice of a prompt carries the prompt's logprobs.
        found = choices.all[prompt * self._job.params.n].prompt_logprobs
        if found is not None:
            self._found[prompt] = found
        delta = OutputDelta(
            request_id=self._id,
            index=index,
            token_ids=choice.token_ids,
            text=choice.text,
            logprobs=choice.logprobs,
            finish_reason=choice.finish_reason,
        )
        content = self._choice(index, prompt, delta, begins=True)
        if choice.finish_reason is not None:
            content["finish_reason"] = self._reason(choice.finish_reason.value)
        content["stop_reason"] = None if self._is_silent else choice.stop_reason
        if self._prompt_logprobs is not None:
            found = self._found.get(prompt)
            content["prompt_logprobs"] = found and prompt_logprobs(self._texts, found, self._prompt_logprobs)
        return content

    def events(self, choices: Choices, prompt: int, delta: OutputDelta) -> bytes:
        index = choices.index(prompt, delta)
        if delta.prompt_logprobs is not None:
            self._found[prompt] = delta.prompt_logprobs
        begins = index not in self._begun
        self._begun.add(index)
        data = b""
        if self._is_plain and not (begins and self._echoed is not None) and index not in self._joins:
            if delta.text:
                data = self._before + f'{index},"text":{quoted(delta.text)}'.encode() + self._after
        elif begins or delta.text or delta.token_ids or index in self._joins:
            data = self._chunk(choices, self._choice(index, prompt, delta, begins))
        if delta.finish_reason is not None:
            last = self._last_choice(index)
            last["finish_reason"] = self._reason(delta.finish_reason.value)
            last["stop_reason"] = None if self._is_silent else delta.stop_reason
            data += self._chunk(choices, last)
        return data

    def closing_events(self, choices: Choices) -> bytes:
        if not self._counts_usage:
            return b""
        return event(self._chunk_fields() | {"choices": [], "usage": self._usage(choices)})

    def _chunk(self, choices: Choices, choice: dict[str, Any]) -> bytes:
        fields = self._chunk_fields() | {"choices": [choice]}
        if self._counts_usage:
            fields["usage"] = self._usage(choices) if self._counts_always else None
        return event(fields) if self._is_plain else long_event(fields)

    def _choice(self, index: int, prompt: int, delta: OutputDelta, begins: bool) -> dict[str, Any]:
        """What a delta adds to a choice: its prompt's echo if it begins the choice, then its own text and tokens."""
        content = self._empty_choice(index)
        echo = self._echoed[prompt] if begins and self._echoed is not None else None
        if echo is not None:
            if isinstance(echo, str):
                content["text"] = echo
            elif self._is_silent:
                content["text"] = echo.alone
            else:
                content["text"], self._joins[index] = echo.text, echo.join()
        content["text"] += self._joined(index, delta)
        if not self._is_silent:
            content["text"] += delta.text
        if self._wants_logprobs:
            blocks = self._blocks(index, prompt, delta, echo)
            content["logprobs"] = {
                name: Long([x for block in blocks for x in block[name]]) for name in BLOCK_FIELDS
            }
        if self._returns_ids:
            content["token_ids"] = Long([] if self._is_silent else delta.token_ids)
            content["prompt_token_ids"] = Long(self._job.prompts[prompt]) if begins else None
        return content

    def _joined(self, index: int, delta: OutputDelta) -> str:
        """What an echo's end contributes, once the output has decided it."""
        join = self._joins.get(index)
        if join is None:
            return ""
        text = join.push(delta.token_ids)
        if delta.finish_reason is not None:
            text += join.finish()
        if not join.is_open:
            del self._joins[index]
        return text

    def _blocks(self, index: int, prompt: int, delta: OutputDelta, echo: Any) -> list[dict[str, list[Any]]]:
        """The log-probabilities of a delta, behind those of the prompt that it echoes."""
        blocks, ids = [], self._job.prompts[prompt]
        if index not in self._readers:
            before = () if self._echoed is not None else ids
            offsets = self._tokenizer.text_offsets(before, self._job.params.skip_special_tokens)
            self._readers[index] = CompletionLogprobs(self._texts, self._count, offsets, self._as_ids)
        reader = self._readers[index]
        if echo is not None:
            found = self._found.get(prompt) or [None] * len(ids)
            given = echo if isinstance(echo, str) else None
            blocks.append(reader.block(ids, found, given))
            if given is not None:
                # Decoding may differ from the text as given (a normalizing tokenizer): the output begins behind it.
                reader.seek(len(given))
        if delta.token_ids and not self._is_silent:
            blocks.append(reader.block(delta.token_ids, delta.logprobs or [None] * len(delta.token_ids)))
        return blocks

    def _empty_choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def _last_choice(self, index: int) -> dict[str, Any]:
        """The choice of a stream's last chunk. What was asked for is there and empty: loops that read every chunk's
        block need no test for null."""
        last = self._empty_choice(index)
        if self._wants_logprobs:
            last["logprobs"] = {name: [] for name in BLOCK_FIELDS}
        if self._returns_ids:
            last |= {"token_ids": [], "prompt_token_ids": None}
        return last

    def _reason(self, reason: str) -> str:
        return "length" if self._is_silent and reason != "abort" else reason

    def _usage(self, choices: Choices) -> dict[str, Any]:
        return choices.usage(0 if self._is_silent else None)

    def _chunk_fields(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
