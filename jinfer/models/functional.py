"""Plain functions on arrays, for research code: no engine, no cache, usable under jit, grad and vmap."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jinfer.config import EngineConfig
from jinfer.errors import ModelError, RequestError
from jinfer.layers.attention import KVKind, LayerIndex, causal_attention
from jinfer.models.decoder import Params
from jinfer.platform import own_settings, prepare_platform


def load_params(model: str | os.PathLike[str], **options: Any) -> Params:
    """The parameters of a model folder, hub id or bundled model, as a pytree.

    Args:
      options: fields of `EngineConfig`, for instance dtype="float32" or tensor_parallel_size=4.
    """
    from jinfer.models.loading import load_model

    config = EngineConfig(model=os.fspath(model), **options)
    prepare_platform(config)
    with own_settings():
        return load_model(config).params


def forward(params: Params, tokens: Int[Array, "*B S"]) -> Float[Array, "*B S V"]:
    """float32 logits of whole sequences: position i's are of the token after tokens[..., :i + 1].

    Equals what the engine computes token by token. In bfloat16 log-probabilities of the bundled model differ from the
    engine's by 0.06 at most when run op by op, and by 0.25 under jit, where XLA rounds elsewhere; bfloat16 itself is up
    to 0.4 from float32. Sequences are causal and start at position 0.

    Under jit, grad of jit and vmap the ids cannot be looked at: the logits of one out of range mean nothing.

    Raises:
      RequestError: tokens is not one sequence or a batch of them, is empty, or has ids that are no integers or beyond
        the vocabulary. It is a ValueError.
      ModelError: the checkpoint has no head.
    """
    if not params.spec.config.has_head:
        raise ModelError("the checkpoint has no head, so there are no logits: LLM.embed gives its embeddings")
    with own_settings():
        return _forward(params, _read_tokens(tokens, params.spec.config.vocab_size))


def _read_tokens(tokens: Any, vocab_size: int) -> Int[Array, "*B S"]:
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except Exception as error:
            raise RequestError(
                f"tokens cannot be made an array ({error}): give rows of one length", "tokens"
            ) from error
    if tokens.ndim not in (1, 2):
        raise RequestError(
            f"tokens has shape {tokens.shape}: expected [sequence] or [batch, sequence]", "tokens"
        )
    if tokens.size == 0:
        raise RequestError(f"tokens has shape {tokens.shape}: expected at least one token", "tokens")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise RequestError(f"tokens has dtype {tokens.dtype}: expected integers, token ids", "tokens")
    if not isinstance(tokens, Tracer):
        found = np.asarray(tokens)
        for token in (int(found.min()), int(found.max())):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"tokens has token id {token}, expected integers from 0 to {vocab_size - 1}", "tokens"
                )
    return jnp.asarray(tokens, jnp.int32)


def _forward(params: Params, tokens: Int[Array, "*B S"]) -> Float[Array, "*B S V"]:
    batch = tokens.shape[0] if tokens.ndim == 2 else 1
    length = tokens.shape[-1]
    decoder = params.bind()

    def attend(
        q: Array,
        k: Array,
        v: Array,
        cache: None,
        layer: LayerIndex,
        *,
        kind: KVKind,
        scale: float,
        soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> tuple[Array, None]:
        q4, k4, v4 = (x.reshape(batch, length, *x.shape[1:]) for x in (q, k, v))
        y = causal_attention(q4, k4, v4, scale, window=kind.window, soft_cap=soft_cap, sinks=sinks)
        return y.reshape(q.shape), cache

    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    lengths = jnp.full(batch * length, length, jnp.int32)
    hidden, _ = decoder(tokens.reshape(-1), positions, attend, None, lengths)
    return decoder.logits(hidden).reshape(*tokens.shape, -1)
