"""Attention written to be read: all logits at once, float32. The oracle of every other implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import AttentionSpec

__all__ = ["attend", "why_not"]


def why_not(spec: AttentionSpec) -> str | None:
    return None


def attend(q, k, v, lengths, sinks, spec: AttentionSpec):
    query, key, value = (x.astype(jnp.float32) for x in (q, k, v))
    key, value = (jnp.repeat(x, spec.groups, axis=2) for x in (key, value))
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") * spec.scale
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    token = jnp.arange(spec.length)
    distance = token[:, None] - token[None, :]
    visible = distance >= 0 if spec.causal else jnp.ones_like(distance, bool)
    if spec.window is not None:
        visible &= jnp.abs(distance) < spec.window
    live = token < lengths[:, None]  # [B, T]
    logits = jnp.where(visible & live[:, None, None, :], logits, -jnp.inf)
    if spec.has_sinks:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink], axis=3)
    # A dead query may see nothing; its row is made zero below, whatever it was.
    weights = jax.nn.softmax(jnp.where(live[:, None, :, None], logits, 0.0), axis=3)[..., : spec.length]
    value = jnp.where(live[:, :, None, None], value, 0.0)
    output = jnp.einsum("bhts,bshd->bthd", weights, value, precision="highest")
    return jnp.where(live[:, :, None, None], output, 0.0).astype(q.dtype)
