"""The shapes of answers, for openapi.json; a test holds real answers against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class ErrorDetails(Shape):
    message: str
    type: str
    param: str | None = Field(description="the field at fault")
    code: str | None


class ErrorAnswer(Shape):
    """The body of every answer that is not a success."""

    error: ErrorDetails


class PromptTokensDetails(Shape):
    cached_tokens: int | None = None


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class TokenLogprob(Shape):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobsBlock(Shape):
    content: list[ContentLogprob]
    refusal: None


class RankedLogprob(Shape):
    logprob: float
    rank: int
    decoded_token: str


FinishReason = Literal["stop", "length", "abort"] | None
PromptLogprobs = list[dict[str, RankedLogprob] | None] | None


class ChatMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Shape):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobsBlock | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatAnswer(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: None
    system_fingerprint: None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs = None


class ChatDelta(Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Shape):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobsBlock | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(Shape):
    """The data of one event; the last event is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobsBlock(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChunkChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobsBlock | None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionChoice(CompletionChunkChoice):
    prompt_logprobs: PromptLogprobs = None


class CompletionAnswer(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    service_tier: None
    system_fingerprint: None


class CompletionChunk(Shape):
    """The data of one event; the last event is `[DONE]`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="numbers, or float32 in base64")


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(Shape):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None
    parent: None
    max_model_len: int | None


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="the vocabulary's own spelling")


class DetokenizeAnswer(Shape):
    prompt: str


class TokenizerInfo(Shape):
    """What tokenizer_config.json has, as far as the server goes by it."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    added_tokens_decoder: dict[str, dict[str, Any]]
    vocab_size: int
    model_max_length: int
    chat_template: str | None


class Status(Shape):
    status: Literal["ok", "draining"]
    model: str | None = None


class Version(Shape):
    version: str
