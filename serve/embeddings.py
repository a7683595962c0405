"""POST /v1/embeddings

Inputs run through the engine's own steps, in chunks beside the streams that are being generated.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from jinfer import FinishReason, PoolingParams, SamplingParams
from serve.answer import WholeAnswer, WholeFormat
from serve.generation import Choices, Job
from serve.inputs import read_prompts
from serve.params import answer_id, check_queueing
from serve.protocol import APIError, bad_request
from serve.requestlog import logger_for
from serve.schemas import EmbeddingBody
from serve.state import State

MAX_INPUTS = 2048  # OpenAI's limit
FORMATS = ("float", "base64")
# A step yields a token at the end of every prompt; the engine drops it.
PARAMS = SamplingParams(temperature=0.0, max_tokens=1)


async def answer_embeddings(state: State, body: EmbeddingBody, deadline: float) -> WholeAnswer:
    """The answer to an embeddings request, not begun yet. Raises APIError or RequestError for a request at fault."""
    state.check_model(body.model)
    if body.encoding_format not in (None, *FORMATS):
        raise bad_request(
            f"encoding_format is {body.encoding_format[:60]!r}, expected one of {', '.join(FORMATS)}",
            "encoding_format",
        )
    size = state.engine.embedding_size
    if body.dimensions is not None and body.dimensions != size:
        raise bad_request(
            f"dimensions is {body.dimensions}, and this model's vectors have {size}: leave it out. A shortened vector "
            "means something only with models that were trained for it",
            "dimensions",
            "unsupported_field",
        )
    if None not in (body.normalize, body.use_activation) and body.normalize != body.use_activation:
        raise bad_request(
            f"normalize is {body.normalize} and use_activation {body.use_activation}, two names of one thing: give one",
            "use_activation",
        )
    check_queueing(body, state.limits)
    job = await state.in_thread(_prepare, state, body)
    form = EmbeddingFormat(state.model_name, job, body.encoding_format == "base64")
    return EmbeddingAnswer(state, job, form, deadline, logger_for(state, job, "embedding"))


def _prepare(state: State, body: EmbeddingBody) -> Job:
    inputs = read_prompts(body.input, "input")
    most = min(MAX_INPUTS, state.engine.config.max_num_waiting)
    if len(inputs) > most:
        raise bad_request(f"input has {len(inputs)} entries, at most {most} are taken: split it", "input")
    own = state.engine.default_pooling if body.pooling is None else PoolingParams(body.pooling)
    normalize = body.use_activation if body.normalize is None else body.normalize
    pooling = own if normalize is None else PoolingParams(own.pooling, normalize)
    tokenizer, adds = state.engine.tokenizer, body.add_special_tokens is not False
    texts = [each for each in inputs if isinstance(each, str)]
    # Inputs are all of one kind: texts, or lists of ids.
    ids: Any = tokenizer.encode_batch(texts, adds) if texts else inputs
    for each in ids:
        state.validate(each, PARAMS, "input", prompt_only=True)
    return Job(
        answer_id("embd", body.request_id), ids, PARAMS, body.priority or 0, body.cache_salt or "", pooling
    )


class EmbeddingFormat:
    """The body of an embeddings answer."""

    def __init__(self, model: str, job: Job, as_base64: bool) -> None:
        self._model = model
        self._job = job
        self._as_base64 = as_base64

    def whole(self, choices: Choices) -> dict[str, Any]:
        tokens = sum(map(len, self._job.prompts))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": self._vector(choice.embedding)}
                for i, choice in enumerate(choices.all)
            ],
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _vector(self, vector: Any) -> str | list[float]:
        if self._as_base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()


class EmbeddingAnswer(WholeAnswer):
    """One JSON body. It may have millions of numbers, so it is written on a thread."""

    async def _body(self, choices: Choices) -> bytes:
        if any(c.finish_reason is FinishReason.ABORT or c.embedding is None for c in choices.all):
            raise APIError(
                500, "the request was ended before its embeddings were there", code="request_failed"
            )
        return await self._state.in_thread(_encode, self._form, choices)


def _encode(form: WholeFormat, choices: Choices) -> bytes:
    fields = form.whole(choices)
    # Entry by entry: the encoder keeps Python's lock for as long as one call takes.
    data = ",".join([json.dumps(entry, separators=(",", ":")) for entry in fields.pop("data")])
    rest = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return f'{{"data":[{data}],{rest[1:]}'.encode()
