"""Request bodies. Types are strict (no "5" for 5); ranges are checked where the values act.

Lists that can be as long as the body (messages, prompts, token ids) are `Any` here and read by `inputs.py`: a
validator that reports each of a million wrong entries is a way to fill the memory.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from serve.fields import refuse_unsupported
from serve.protocol import bad_request

M = TypeVar("M", bound="Body")


def _no_float_for_int(value: Any) -> Any:
    """JSON has one number type: 16.0 is a fine integer, 16.5 is not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _none_for_false(value: Any) -> Any:
    """Clients that know the chat's `logprobs`, a boolean, send false for none."""
    return None if value is False else value


Int = Annotated[int, BeforeValidator(_no_float_for_int)]


def ranged(
    low: float | None = None, high: float | None = None, above: float | None = None, help: str = ""
) -> Any:
    """A field that may be left out, with the range that openapi.json shows; it is checked where the value acts."""
    span = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return Field(
        None,
        description=help or None,
        json_schema_extra={name: bound for name, bound in span.items() if bound is not None},
    )


def shown(help: str, *forms: dict[str, Any]) -> Any:
    """The form, for openapi.json alone, of a value that is read elsewhere; see the head of this module."""
    kinds = [*forms, {"type": "null"}]
    return WithJsonSchema({"anyOf": kinds, "default": None, "description": help})


TEXT: dict[str, Any] = {"type": "string"}
OBJECT: dict[str, Any] = {"type": "object"}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}


def many(items: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items} | ({} if most is None else {"maxItems": most})


PROMPTS = (TEXT, IDS, many(TEXT), many(IDS))
Messages = Annotated[Any, shown("a list of {role, content}", many(OBJECT))]
Objects = Annotated[Any, shown("a list of objects", many(OBJECT))]
TokenIds = Annotated[Any, shown("a list of token ids", IDS)]
Prompts = Annotated[Any, shown("a string, token ids, or a list of either", *PROMPTS)]
Stops = Annotated[Any, shown("a string, or a list of strings", TEXT, many(TEXT, 16))]
Bias = Annotated[
    Any,
    shown(
        "token id (as a string) -> number from -100 to 100",
        OBJECT | {"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    ),
]
ToolChoice = Annotated[Any, shown("none: calls in the output are not parsed", TEXT, OBJECT)]


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


LARGEST = 2**31 - 1
PRIORITY = ranged(-LARGEST, LARGEST, help="lower runs first; needs --scheduling-policy priority")
SALT = Field(
    None,
    description="prompts share pages of the prefix cache with those of the same salt only",
    json_schema_extra={"minLength": 1, "maxLength": 1024},
)
REQUEST_ID = Field(
    None, description="the second half of the answer's id", json_schema_extra={"pattern": "^[!-~]{1,128}$"}
)


class SamplingBody(Body):
    """What chat and text completions share. Names and meaning are OpenAI's, and vLLM's for its extras."""

    max_tokens: Int | None = ranged(1, LARGEST)
    temperature: float | None = ranged(0, 100)
    top_p: float | None = ranged(above=0, high=1)
    top_k: Int | None = ranged(-1, LARGEST, help="0 and -1: all")
    min_p: float | None = ranged(0, 1)
    n: Int | None = ranged(1, 64)
    seed: Int | None = ranged(-(2**63), 2**63 - 1, help="-1: a random one")
    presence_penalty: float | None = ranged(-2, 2)
    frequency_penalty: float | None = ranged(-2, 2)
    repetition_penalty: float | None = ranged(1e-6, 100)
    logit_bias: Bias = None
    stop: Stops = None
    stop_token_ids: TokenIds = None
    min_tokens: Int | None = ranged(0, LARGEST)
    ignore_eos: bool | None = None
    prompt_logprobs: Int | None = ranged(0, 20)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int | None = PRIORITY
    cache_salt: str | None = SALT
    request_id: str | None = REQUEST_ID


class TemplateBody(Body):
    """What decides how messages become a prompt."""

    messages: Messages = None
    tools: Objects = None
    documents: Objects = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, description="for templates that have a place for it")


class ChatBody(SamplingBody, TemplateBody):
    """POST /v1/chat/completions"""

    max_completion_tokens: Int | None = ranged(1, LARGEST)
    logprobs: bool | None = None
    top_logprobs: Int | None = ranged(0, 20)
    tool_choice: ToolChoice = None


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    max_tokens: Int | None = ranged(0, LARGEST, help="16 if left out; 0 makes no output, for echo")
    prompt: Prompts = None
    echo: bool | None = None
    logprobs: Annotated[Int | None, BeforeValidator(_none_for_false)] = ranged(0, 20)


class EmbeddingBody(Body):
    """POST /v1/embeddings. pooling and normalize are jinfer's own; they default to what the model's folder says."""

    input: Prompts = None
    encoding_format: str | None = Field(None, json_schema_extra={"enum": ["float", "base64", None]})
    dimensions: Int | None = Field(None, description="the model's own number")
    pooling: str | None = Field(None, json_schema_extra={"enum": ["last", "mean", None]})
    normalize: bool | None = None
    use_activation: bool | None = Field(None, description="another name of normalize")
    add_special_tokens: bool | None = None
    priority: Int | None = PRIORITY
    cache_salt: str | None = SALT
    request_id: str | None = REQUEST_ID


class TokenizeBody(TemplateBody):
    """POST /tokenize: `prompt`, or `messages` with the fields of a chat."""

    prompt: Annotated[Any, shown("the text", TEXT)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    tokens: TokenIds = None
    skip_special_tokens: bool | None = Field(
        None, description="leave special tokens out; they are shown by default"
    )


@functools.cache
def every_field() -> frozenset[str]:
    """The fields of all endpoints together."""
    bodies = (ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, DetokenizeBody)
    return frozenset(name for body in bodies for name in body.model_fields)


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):  # its text may be as long as the body
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} members"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _lower(message: str) -> str:
    """pydantic's 'Input should be a valid integer' as the end of a sentence."""
    return message.replace("Input should be", "it should be").replace(
        "Extra inputs are", "unknown fields are"
    )
