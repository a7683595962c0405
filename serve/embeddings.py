"""POST /v1/embeddings

Inputs run through the engine's own steps, in chunks beside the streams that are being generated.
"""

from __future__ import annotations

import base64
from typing import Any

from jinfer import FinishReason, PoolingParams, SamplingParams
from serve.answer import Plan
from serve.generation import Choices, Job
from serve.inputs import read_prompts
from serve.jsonpieces import Encoded, Long, dumps
from serve.params import answer_id, check_queueing
from serve.protocol import APIError, bad_request
from serve.schemas import EmbeddingBody
from serve.state import State

MAX_INPUTS = 2048  # OpenAI's limit
FORMATS = ("float", "base64")
# A step yields a token at the end of every prompt; the engine drops it.
PARAMS = SamplingParams(temperature=0.0, max_tokens=1)


def plan_embeddings(state: State, fields: dict[str, Any]) -> Plan:
    """What an embeddings request asks for. Raises APIError or RequestError for a request at fault."""
    body = EmbeddingBody.read(fields)
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
    job = _job(state, body)
    return Plan(job, EmbeddingFormat(state.model_name, job, body.encoding_format == "base64"), "embedding")


def _job(state: State, body: EmbeddingBody) -> Job:
    inputs = read_prompts(body.input, "input")
    most = min(MAX_INPUTS, state.engine.config.max_num_waiting)
    if len(inputs) > most:
        raise bad_request(f"input has {len(inputs)} entries, at most {most} are taken: split it", "input")
    own = state.engine.default_pooling if body.pooling is None else PoolingParams(body.pooling)
    normalize = body.use_activation if body.normalize is None else body.normalize
    pooling = own if normalize is None else PoolingParams(own.pooling, normalize)
    adds = body.add_special_tokens is not False
    # One by one: the first that is too long ends the work.
    ids = [each if isinstance(each, list) else state.encode(each, adds, "input") for each in inputs]
    checked = [state.validate(each, PARAMS, "input", prompt_only=True) for each in ids]
    return Job(
        answer_id("embd", body.request_id),
        checked,
        PARAMS,
        body.priority or 0,
        body.cache_salt or "",
        pooling,
    )


class EmbeddingFormat:
    """The body of an embeddings answer."""

    def __init__(self, model: str, job: Job, as_base64: bool) -> None:
        self._model = model
        self._job = job
        self._as_base64 = as_base64

    def whole(self, choices: Choices) -> dict[str, Any]:
        if any(c.finish_reason is FinishReason.ABORT or c.embedding is None for c in choices.all):
            raise APIError(
                500, "the request was ended before its embeddings were there", code="request_failed"
            )
        tokens = self._job.num_prompt_tokens
        return {
            "object": "list",
            # Entry by entry, for each may have thousands of numbers.
            "data": Long(
                (
                    Encoded(
                        dumps(
                            {"object": "embedding", "index": i, "embedding": self._vector(choice.embedding)}
                        )
                    )
                    for i, choice in enumerate(choices.all)
                ),
                group=1,
            ),
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _vector(self, vector: Any) -> str | list[float]:
        if self._as_base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()
