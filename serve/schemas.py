"""Request bodies. Types are strict (no "5" for 5); ranges are checked where the values act.

Lists that can be as long as the body (messages, prompts, token ids) are `Any` here and read by `inputs.py`: a
validator that reports each of a million wrong entries is a way to fill the memory.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from serve.fields import refuse_unsupported
from serve.protocol import bad_request

M = TypeVar("M", bound="Body")


def _no_float_for_int(value: Any) -> Any:
    """JSON has one number type: 16.0 is a fine integer, 16.5 is not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_no_float_for_int)]


class Body(BaseModel):
    """Any request body. None always means "left out"."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="the served model; may be left out")

    @classmethod
    def read(cls: type[M], body: dict[str, Any]) -> M:
        """The body as this model. Raises APIError (400) naming the first field at fault."""
        taken = refuse_unsupported(body, frozenset(cls.model_fields), every_field())
        try:
            return cls.model_validate(taken)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            path = ".".join(str(part) for part in first["loc"])
            name = str(first["loc"][0]) if first["loc"] else None
            if first["type"] == "missing":
                raise bad_request(f"{path} is missing: the request needs it", name) from None
            given = _shown(first["input"])
            raise bad_request(f"{path} is {given}: {_lower(first['msg'])}", name) from None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """What chat and text completions share. Names and meaning are OpenAI's, and vLLM's for its extras."""

    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    n: Int | None = None
    seed: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Any = Field(None, description="token id (as a string) -> number from -100 to 100")
    stop: Any = Field(None, description="a string, or a list of strings")
    stop_token_ids: Any = Field(None, description="a list of token ids")
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    request_id: str | None = Field(None, description="the second half of the answer's id")


class TemplateBody(Body):
    """What decides how messages become a prompt."""

    messages: Any = Field(None, description="a list of {role, content}")
    tools: Any = None
    documents: Any = Field(None, description="a list of objects, for templates that show documents")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, description="for templates that have a place for it")


class ChatBody(SamplingBody, TemplateBody):
    """POST /v1/chat/completions"""

    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tool_choice: Any = None


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: Any = Field(None, description="a string, token ids, or a list of either")
    echo: bool | None = None
    logprobs: Int | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings. pooling and normalize are jinfer's own; they default to what the model's folder says."""

    input: Any = Field(None, description="a string, token ids, or a list of either")
    encoding_format: str | None = Field(None, description="float or base64")
    dimensions: Int | None = None
    pooling: str | None = Field(None, description="last or mean")
    normalize: bool | None = None
    use_activation: bool | None = Field(None, description="another name of normalize")
    add_special_tokens: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    request_id: str | None = None


class TokenizeBody(TemplateBody):
    """POST /tokenize: `prompt`, or `messages` with the fields of a chat."""

    prompt: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    tokens: Any = Field(None, description="a list of token ids")
    skip_special_tokens: bool | None = Field(
        None, description="leave special tokens out; they are shown by default"
    )


@functools.cache
def every_field() -> frozenset[str]:
    """The fields of all endpoints together."""
    bodies = (ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, DetokenizeBody)
    return frozenset(name for body in bodies for name in body.model_fields)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _lower(message: str) -> str:
    """pydantic's 'Input should be a valid integer' as the end of a sentence."""
    return message.replace("Input should be", "it should be").replace(
        "Extra inputs are", "unknown fields are"
    )
