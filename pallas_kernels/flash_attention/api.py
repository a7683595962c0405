"""The contract of dense attention: whole sequences in, nothing kept.

    y = attend(q, k, v, scale=head_dim**-0.5)                        # causal
    y = attend(q, k, v, scale=head_dim**-0.5, lengths=lengths)       # sequences padded to T

For inference: no gradient is defined. Under `shard_map` over heads or sequences every function sees its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import AUTO, Registry
from pallas_kernels.flash_attention import gpu, reference, tpu, xla
from pallas_kernels.flash_attention.spec import AttentionSpec

FLOATS = ("float32", "bfloat16")


class Implementation(Protocol):
    """The rooms an implementation's module has.

    `attend` gets q [B, T, H, D], k and v [B, T, K, D], all of the spec's dtype, lengths int32[B] within 0..T, and
    sinks [H] or None; it returns q's shape and dtype, with finite rows past a sequence's length.
    """

    def why_not(self, spec: AttentionSpec) -> str | None: ...
    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        lengths: jax.Array,
        sinks: jax.Array | None,
        spec: AttentionSpec,
    ) -> jax.Array: ...


REGISTRY: Registry[Implementation] = Registry(
    "flash_attention", platform_order={"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "*": ("xla",)}
)
REGISTRY.add("reference", cast(Implementation, reference))
REGISTRY.add("xla", cast(Implementation, xla))
REGISTRY.add("tpu", cast(Implementation, tpu))
REGISTRY.add("gpu", cast(Implementation, gpu))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    lengths: jax.Array | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    implementation: str = AUTO,
) -> jax.Array:
    """Attention of every token over its own sequence: softmax(soft_cap(scale * q k^T)) v, in float32.

    Query head h reads KV head h // (H // K).

    Args:
      q: [B, T, H, D], float32 or bfloat16; H a multiple of K.
      k, v: [B, T, K, D] in q's dtype.
      scale: factor of the logits, usually D ** -0.5.
      lengths: int32[B], the live tokens of each sequence, 0 to T. None: all T.
      causal: a token sees itself and what is before it; False: all of its sequence.
      sliding_window: a token sees only the last `sliding_window` tokens, itself included; without `causal` also as
        many after it.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), before the mask.
      sinks: [H] logits that take part in each softmax's sum and carry no value.
      implementation: `"auto"`, or the name of one: it then serves or the call fails.

    Returns:
      [B, T, H, D] in q's dtype. Tokens past their sequence's length give finite numbers, otherwise anything.

    Raises:
      ValueError: an argument is outside the contract, or the named implementation cannot serve it.
    """
    spec = _spec(q, k, v, scale, causal, sliding_window, soft_cap, sinks)
    if lengths is None:
        lengths = jnp.full((spec.batch,), spec.length, jnp.int32)
    if lengths.shape != (spec.batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths is {lengths.dtype}{list(lengths.shape)}: it must be int32[{spec.batch}]")
    name, _ = REGISTRY.choose(implementation, lambda member: member.why_not(spec))
    return _attend(q, k, v, lengths, sinks, implementation=name, spec=spec)


@partial(
    jax.jit, static_argnames=("implementation", "spec")
)  # the layers of an unrolled model are traced once
def _attend(q, k, v, lengths, sinks, *, implementation: str, spec: AttentionSpec):
    return REGISTRY[implementation].attend(q, k, v, lengths, sinks, spec)


def _spec(q: Any, k: Any, v: Any, scale, causal, sliding_window, soft_cap, sinks) -> AttentionSpec:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(
            f"q has shape {q.shape}: it must be [batch, tokens, heads, head_dim], none of them 0"
        )
    batch, length, num_heads, head_dim = q.shape
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (batch, length, head_dim) or k.shape[2] < 1:
        raise ValueError(
            f"k has shape {k.shape}: with q of {q.shape} it must be ({batch}, {length}, KV heads, {head_dim})"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}: it must be k's, {k.shape}")
    num_kv_heads = k.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"q has {num_heads} heads: it must be a multiple of k's {num_kv_heads}")
    if q.dtype.name not in FLOATS:
        raise ValueError(f"q has dtype {q.dtype.name}: it must be one of {list(FLOATS)}")
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {value.dtype.name}: it must be q's, {q.dtype.name}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}: it must be at least 1, or None for no window")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}: it must be above 0, or None for no cap")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks has shape {sinks.shape}: it must be ({num_heads},), one logit per query head"
        )
    return AttentionSpec(
        batch=batch,
        length=length,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=jnp.dtype(q.dtype),
        scale=float(scale),
        causal=bool(causal),
        window=sliding_window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
    )
