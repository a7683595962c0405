"""Plain functions on arrays, for research code: no engine, no cache, usable under jit, grad and vmap."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jinfer.config import EngineConfig
from jinfer.errors import ModelError
from jinfer.layers.attention import KVKind, LayerIndex, causal_attention
from jinfer.models.decoder import Params
from jinfer.platform import prepare_platform


def load_params(model: str, **options: Any) -> Params:
    """The parameters of a model folder, hub id or bundled model, as a pytree.

    Args:
      options: fields of `EngineConfig`, for instance dtype="float32" or tensor_parallel_size=4.
    """
    from jinfer.models.loading import load_model

    config = EngineConfig(model=model, **options)
    prepare_platform(config)
    return load_model(config).params


def forward(params: Params, tokens: Int[Array, "*B S"]) -> Float[Array, "*B S V"]:
    """float32 logits of whole sequences: position i's are of the token after tokens[..., :i + 1].

    Equals what the engine computes token by token; see tests. Sequences are causal and start at position 0.

    Raises:
      ValueError: tokens is not one sequence or a batch of them.
      ModelError: the checkpoint has no head.
    """
    if not params.spec.config.has_head:
        raise ModelError("the checkpoint has no head, so there are no logits: LLM.embed gives its embeddings")
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokens has shape {tokens.shape}: expected [sequence] or [batch, sequence]")
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
