"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from jinfer import OutputDelta
from serve.answer import Plan, event, long_event
from serve.bounds import bounded_params
from serve.generation import Choice, Choices, Job
from serve.inputs import read_documents, read_messages, read_tools
from serve.jsonpieces import Long
from serve.logprobs import ChatLogprobs, TokenTexts, prompt_logprobs
from serve.params import answer_id, chat_params, force_usage
from serve.protocol import bad_request
from serve.schemas import ChatBody, TemplateBody
from serve.state import State

# Variables by which templates switch thinking off.
THINKING_SWITCHES = ("enable_thinking", "thinking")


def plan_chat(state: State, fields: dict[str, Any]) -> Plan:
    """What a chat request asks for. Raises APIError or RequestError for a request at fault.

    For a thread: a template may take its time, and a body may hold thousands of messages.
    """
    body = ChatBody.read(fields)
    state.check_model(body.model)
    if state.config.enable_force_include_usage:
        force_usage(body)
    params = chat_params(body, state.engine.default_params, state.limits)
    tools = read_tools(body.tools, body.tool_choice)
    ids = prompt_ids(state, body, tools, bool(body.add_special_tokens))
    params = bounded_params(state, [ids], params, streams=bool(body.stream))
    prompt = state.validate(ids, params, "messages")
    job = Job(
        answer_id("chatcmpl", body.request_id), [prompt], params, body.priority or 0, body.cache_salt or ""
    )
    return Plan(job, ChatFormat(body, job, state.model_name, state.token_texts), "chat", bool(body.stream))


def prompt_ids(
    state: State, body: TemplateBody, tools: list[dict[str, Any]] | None, add_special_tokens: bool
) -> list[int]:
    """The token ids of a conversation. Raises APIError or RequestError."""
    messages = read_messages(body.messages)
    template = state.chat_template
    if template is None:
        raise bad_request(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            "messages",
        )
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt cannot both be true", "continue_final_message"
        )
    if continues and not (isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"):
        raise bad_request(
            "continue_final_message needs an assistant message at the end", "continue_final_message"
        )
    begins = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    with state.refusing_long_prompts("messages"):
        ids, _ = template.tokens(
            state.engine.tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=begins,
            continue_final_message=continues,
            chat_template_kwargs=_variables(template, body),
            documents=read_documents(body.documents),
            # Calls are forbidden: a template without a place for tools has nothing to say about them.
            tools_are_optional=True,
            add_special_tokens=add_special_tokens,
            allow_special_tokens=state.config.allow_special_tokens,
            max_tokens=state.engine.max_model_len,
        )
    return ids


def _variables(template: Any, body: TemplateBody) -> dict[str, Any]:
    """chat_template_kwargs, and reasoning_effort under the name that the template has for it. Raises APIError."""
    extra = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        return extra
    name, value = "reasoning_effort", effort
    if not template.reads(name):
        switches = (switch for switch in THINKING_SWITCHES if template.reads(switch))
        switch = next(switches, None) if effort == "none" else None
        if switch is None:
            raise bad_request(
                f"the model's chat template has no place for reasoning_effort {effort[:60]!r}: leave it out",
                name,
                "unsupported_field",
            )
        name, value = switch, False
    if extra.setdefault(name, value) != value:
        raise bad_request(
            f"reasoning_effort is {effort[:60]!r} and in chat_template_kwargs {name} is {str(extra[name])[:60]!r}: give one",
            "reasoning_effort",
        )
    return extra


class ChatFormat:
    """The bodies and events of one chat answer."""

    def __init__(self, body: ChatBody, job: Job, model: str, texts: TokenTexts) -> None:
        self._id = job.request_id
        self._created = int(time.time())
        self._model = model
        self._prompt = job.prompts[0]
        self._texts = texts
        self._logprobs = ChatLogprobs(texts, bool(body.return_tokens_as_token_ids)) if body.logprobs else None
        self._returns_ids = bool(body.return_token_ids)
        self._prompt_logprobs = body.prompt_logprobs
        options = body.stream_options
        self._counts_usage = bool(options and options.include_usage)
        self._counts_always = bool(options and options.continuous_usage_stats and options.include_usage)
        self._has_begun = False
        # The fast path writes JSON by hand around the one thing that changes: a dict per token costs twice as much.
        head = event(self._chunk_fields())
        self._before = head[: -len(b"}\n\n")] + b',"choices":[{"index":'
        self._after = b'},"logprobs":null,"finish_reason":null}]'
        self._after += b',"usage":null}\n\n' if self._counts_usage else b"}\n\n"
        self._is_plain = not (self._logprobs or self._returns_ids or self._counts_always)

    def whole(self, choices: Choices) -> dict[str, Any]:
        answer = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": (self._whole_choice(i, choice) for i, choice in enumerate(choices.all)),
            "usage": choices.usage(),
            "service_tier": None,
            "system_fingerprint": None,
        }
        if self._returns_ids:
            answer["prompt_token_ids"] = Long(self._prompt)
        if self._prompt_logprobs is not None:
            found = choices.all[0].prompt_logprobs
            answer["prompt_logprobs"] = found and prompt_logprobs(self._texts, found, self._prompt_logprobs)
        return answer

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        content = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs_of(choice.logprobs) if self._logprobs else None,
            "finish_reason": choice.finish_reason and choice.finish_reason.value,
            "stop_reason": choice.stop_reason,
        }
        if self._returns_ids:
            content["token_ids"] = Long(choice.token_ids)
        return content

    def events(self, choices: Choices, prompt: int, delta: OutputDelta) -> bytes:
        data = b""
        if not self._has_begun:
            self._has_begun = True
            data = b"".join(self._first(choices, index) for index in range(len(choices.all)))
        if self._is_plain:
            if delta.text:
                piece = f'{delta.index},"delta":{{"content":{quoted(delta.text)}'
                data += self._before + piece.encode() + self._after
        elif delta.text or delta.token_ids:
            data += self._chunk(choices, delta.index, {"content": delta.text}, delta)
        if delta.finish_reason is not None:
            data += self._chunk(choices, delta.index, {}, finish=delta)
        return data

    def closing_events(self, choices: Choices) -> bytes:
        if not self._counts_usage:
            return b""
        return event(self._chunk_fields() | {"choices": [], "usage": choices.usage()})

    def _first(self, choices: Choices, index: int) -> bytes:
        """The chunk that brings the role. All choices' go out at once, in front of any token."""
        return self._chunk(choices, index, {"role": "assistant", "content": ""}, begins=True)

    def _chunk(
        self,
        choices: Choices,
        index: int,
        content: dict[str, Any],
        delta: OutputDelta | None = None,
        finish: OutputDelta | None = None,
        begins: bool = False,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": content, "logprobs": None, "finish_reason": None}
        fields = self._chunk_fields()
        if delta is not None:
            if self._logprobs is not None and delta.logprobs:
                choice["logprobs"] = self._logprobs_of(delta.logprobs)
            if self._returns_ids:
                choice["token_ids"] = delta.token_ids
        if finish is not None and finish.finish_reason is not None:
            choice["finish_reason"] = finish.finish_reason.value
            choice["stop_reason"] = finish.stop_reason
            # Nothing in it, and there: loops that read every chunk's block need no test for null.
            if self._logprobs is not None:
                choice["logprobs"] = self._logprobs_of(())
            if self._returns_ids:
                choice["token_ids"] = []
        if begins and self._returns_ids:
            fields["prompt_token_ids"] = list(self._prompt)
        fields["choices"] = [choice]
        if self._counts_usage:
            fields["usage"] = choices.usage(0 if begins else None) if self._counts_always else None
        return long_event(fields) if self._logprobs is not None else event(fields)

    def _chunk_fields(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
        }

    def _logprobs_of(self, logprobs: Any) -> dict[str, Any]:
        assert self._logprobs is not None
        return {"content": Long(self._logprobs.entries(logprobs)), "refusal": None}
