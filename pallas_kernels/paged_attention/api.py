"""The contract of ragged paged attention.

One pool of KV pages serves all layers of a kind. Layer i of L keeps its pages at ids offset by i * pages_per_layer:
that is `page_offset`, an int or a traced int32, so one function serves an unrolled loop and `lax.scan`. The pool's
layout belongs to the implementation; callers make it from `kv_shape`, shard it with `kv_partition_spec`, pass it
through, and never index into it. Donate it to the jitted step and it is updated in place.

    kv = jnp.zeros(shape.shape, shape.dtype)      # shape = kv_shape(num_layers * pages_per_layer, ...)
    plan = prepare(batch, kv, num_tokens)         # once per step; optional
    for layer in range(num_layers):
        kv = write_kv(kv, k, v, plan, page_offset=layer * pages_per_layer)
        y = attend(q, kv, plan, page_offset=layer * pages_per_layer, scale=head_dim**-0.5)

Under `shard_map` over KV heads every function sees its own heads and nothing else changes.

A pool of int8 or float8_e4m3fn keeps k / k_scale and v / v_scale, with one static scale per layer and KV head (or one
number for all heads) that the caller knows from calibration. Such a scale costs nothing where it matters: k_scale
joins the logits' scale and v_scale the output's, so no kernel multiplies keys or values by it, and pages carry no
scales of their own to fetch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import AUTO, ImplementationError, Registry
from pallas_kernels.paged_attention import cpu, gpu, reference, tpu, xla
from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 128
FLOATS = ("float32", "bfloat16", "float16")
QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # and the largest magnitude that each keeps


class Implementation(Protocol):
    """The rooms an implementation's module has. `plan` is whatever its own `prepare` returned.

    `kv_partition_spec` gives one spec for every array of its pool. `write_kv` gets k and v in the pool's dtype, already
    divided by their scales. `attend` gets k_scale and v_scale as float32[K], or None where the pool is not quantized.

    A module may say more of itself: SHARES_VALUES, that it serves pools with shared values; and beside it
    NARROW_VALUES, that its `attend` takes value_dim (an int) and returns so many columns. Others return all.
    """

    def why_not(self, spec: KVSpec) -> str | None: ...
    def kv_shape(self, spec: KVSpec) -> Any: ...
    def kv_partition_spec(self, tensor_axis: str | None) -> Any: ...
    def kv_spec(self, kv: Any) -> KVSpec | None: ...
    def prepare(self, batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> Any: ...
    def write_kv(self, kv: Any, k: jax.Array, v: jax.Array, plan: Any, *, page_offset) -> Any: ...
    def attend(
        self,
        q: jax.Array,
        kv: Any,
        plan: Any,
        *,
        page_offset,
        scale,
        sliding_window,
        soft_cap,
        sinks,
        k_scale: jax.Array | None,
        v_scale: jax.Array | None,
    ) -> jax.Array: ...


REGISTRY: Registry[Implementation] = Registry(
    "paged_attention",
    platform_order={"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla"), "cpu": ("cpu", "xla"), "*": ("xla",)},
)
REGISTRY.add("reference", cast(Implementation, reference))
REGISTRY.add("xla", cast(Implementation, xla))
REGISTRY.add("cpu", cast(Implementation, cpu))
REGISTRY.add("tpu", cast(Implementation, tpu))
REGISTRY.add("gpu", cast(Implementation, gpu))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepPlan:
    """A `RaggedBatch` and what the chosen implementation derived from it, shared by all layers of a step."""

    batch: RaggedBatch
    detail: Any
    num_tokens: int = field(metadata={"static": True})
    implementation: str = field(metadata={"static": True})


def kv_shape(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    *,
    shared_values: bool = False,
    implementation: str = AUTO,
) -> Any:
    """The pool's shape and dtype: a `jax.ShapeDtypeStruct`, or a pytree of them.

    Args:
      num_pages: pages of all layers together: num_layers * pages_per_layer. Page 0 of each layer is its null page.
      page_size: tokens per page, 8 to 128.
      dtype: of the kept keys and values: float32, bfloat16, float16, int8 or float8_e4m3fn.
      shared_values: keys are the values too, and are kept once: half the bytes. `write_kv` is then given v = k. For
        latent attention, where a token's latent is both.

    Raises:
      ValueError: an argument is outside the contract, or the named implementation cannot serve it.
    """
    for name, value in (("num_pages", num_pages), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: it must be an integer of at least 1")
    if not isinstance(page_size, int) or not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE:
        raise ValueError(
            f"page_size is {page_size!r}: it must be an integer from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}"
        )
    _check_dtype("dtype", dtype, (*FLOATS, *QUANTIZED))
    spec = KVSpec(num_pages, page_size, num_kv_heads, head_dim, jnp.dtype(dtype), shared_values)
    return _choose(implementation, spec)[1].kv_shape(spec)


def kv_partition_spec(tensor_axis: str | None, *, kv: Any = None, implementation: str = AUTO) -> Any:
    """A pytree like the pool, of `PartitionSpec`s that shard it by KV head over `tensor_axis`.

    Without `kv` it is one spec for the whole pool, which `shard_map` and `device_put` take as well.

    Args:
      kv: the pool or its shape. Needed only with `implementation="auto"` where the platform's first choice does not
        serve the pool, and so did not give it its layout.
    """
    if kv is None:
        return REGISTRY.choose(implementation, lambda member: None)[1].kv_partition_spec(tensor_axis)
    spec = _of_pool(kv, implementation)[1].kv_partition_spec(tensor_axis)
    return jax.tree.map(lambda _: spec, kv)


def prepare(batch: RaggedBatch, kv: Any, num_tokens: int, *, implementation: str = AUTO) -> StepPlan:
    """Derives once per step what every layer needs: where tokens are written, which tiles of queries exist.

    `write_kv` and `attend` take the plan in place of the batch; given a bare batch they make the plan themselves, and
    in an unrolled program XLA merges the copies. In a `lax.scan` over layers, prepare outside of it.

    Args:
      kv: the pool, or its shape.
      num_tokens: T, the static length of the flat token axis.
    """
    name, chosen, spec = _of_pool(kv, implementation)
    _check_batch(batch, num_tokens)
    return StepPlan(batch, chosen.prepare(batch, num_tokens, spec), num_tokens, name)


def write_kv(
    kv: Any,
    k: jax.Array,
    v: jax.Array,
    batch: RaggedBatch | StepPlan,
    *,
    page_offset: int | jax.Array,
    k_scale: float | jax.Array | None = None,
    v_scale: float | jax.Array | None = None,
    implementation: str = AUTO,
) -> Any:
    """Returns the pool with this step's keys and values written into their slots, and nothing else changed.

    Equivalent to `kv[page_table[row, position // S] + page_offset, position % S] = k, v` for each live token. Padded
    tokens are not written, or go to the layer's null page.

    Args:
      kv: the pool; donate it to the jitted step.
      k, v: [T, K, D], float32, bfloat16 or float16, cast to the pool's dtype.
      page_offset: layer * pages_per_layer, an int or an int32 scalar (traced is fine).
      k_scale, v_scale: for a pool of int8 or float8_e4m3fn, and only for one: this layer's scales, a number or
        float32[K]. Kept is k / k_scale, rounded and clipped to what the dtype holds.

    Raises:
      ValueError: a shape or dtype does not fit the pool or the batch; scales are missing, or not wanted.
    """
    plan, spec = _planned(kv, batch, k, implementation, "k")
    expected = (plan.num_tokens, spec.num_kv_heads, spec.head_dim)
    for name, value in (("k", k), ("v", v)):
        if value.shape != expected:
            raise ValueError(
                f"{name} has shape {value.shape}: with this pool and batch it must be {expected}"
            )
        _check_dtype(name, value.dtype)
    scales = _scales(spec, k_scale, v_scale)
    return _write_kv(
        kv,
        k,
        v,
        plan.detail,
        jnp.asarray(page_offset, jnp.int32),
        scales,
        dtype=spec.dtype,
        implementation=plan.implementation,
    )


def attend(
    q: jax.Array,
    kv: Any,
    batch: RaggedBatch | StepPlan,
    *,
    page_offset: int | jax.Array,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: float | jax.Array | None = None,
    v_scale: float | jax.Array | None = None,
    value_dim: int | None = None,
    implementation: str = AUTO,
) -> jax.Array:
    """Causal attention of every query over its own row's pages; `write_kv` of this step comes first.

    For a query at position p of its row, over the row's keys j <= p: softmax(soft_cap(scale * q k_j)) v_j in float32.
    Query head h reads KV head h // (H // K). With the batch's `tree_mask` a query also skips the new tokens that are
    not its ancestors; positions, and so the window, stay those of the row's slots.

    Args:
      q: [T, H, D], float32, bfloat16 or float16; H a multiple of the pool's K.
      kv: the pool.
      page_offset: layer * pages_per_layer, an int or an int32 scalar (traced is fine).
      scale: factor of the logits, usually D ** -0.5.
      sliding_window: a query sees only the last `sliding_window` keys, its own included.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap), before the mask.
      sinks: [H] logits that take part in each softmax's sum and carry no value.
      k_scale, v_scale: the scales that `write_kv` was given for this layer; only for a quantized pool.
      value_dim: of a pool with shared values, the leading numbers of a key that are its value: latent attention reads
        512 of 576, and need not compute the rest. None: all of them.

    Returns:
      [T, H, D] in q's dtype, or [T, H, value_dim]. Rows of padded tokens are finite and otherwise anything.

    Raises:
      ValueError: a shape, dtype or number is outside the contract; scales are missing, or not wanted.
    """
    plan, spec = _planned(kv, batch, q, implementation, "q")
    if q.ndim != 3 or q.shape[0] != plan.num_tokens or q.shape[2] != spec.head_dim:
        raise ValueError(
            f"q has shape {q.shape}: with this pool and batch it must be ({plan.num_tokens}, heads, {spec.head_dim})"
        )
    if q.shape[1] % spec.num_kv_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads: it must be a multiple of the pool's {spec.num_kv_heads} KV heads"
        )
    _check_dtype("q", q.dtype)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}: it must be at least 1, or None for no window")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap}: it must be above 0, or None for no cap")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(
            f"sinks has shape {sinks.shape}: it must be ({q.shape[1]},), one logit per query head"
        )
    if value_dim is not None and not (spec.shared_values and 1 <= value_dim <= spec.head_dim):
        raise ValueError(
            f"value_dim is {value_dim}: it must be None, or from 1 to the pool's head_dim of {spec.head_dim} where the "
            "pool has shared_values"
        )
    return _attend(
        q,
        kv,
        plan.detail,
        jnp.asarray(page_offset, jnp.int32),
        sinks,
        _scales(spec, k_scale, v_scale),
        implementation=plan.implementation,
        scale=float(scale),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        value_dim=value_dim,
    )


# Jitted here so that the layers of an unrolled step are traced once, not once each: the offset is an argument.


@partial(jax.jit, static_argnames=("dtype", "implementation"))
def _write_kv(kv, k, v, detail, page_offset, scales, *, dtype, implementation: str):
    k, v = (_stored(x, scale, dtype) for x, scale in zip((k, v), scales, strict=True))
    return REGISTRY[implementation].write_kv(kv, k, v, detail, page_offset=page_offset)


@partial(jax.jit, static_argnames=("implementation", "scale", "sliding_window", "soft_cap", "value_dim"))
def _attend(
    q,
    kv,
    detail,
    page_offset,
    sinks,
    scales,
    *,
    implementation: str,
    scale,
    sliding_window,
    soft_cap,
    value_dim: int | None,
):
    chosen = REGISTRY[implementation]
    narrow = value_dim is not None and getattr(chosen, "NARROW_VALUES", False)
    out = chosen.attend(
        q,
        kv,
        detail,
        page_offset=page_offset,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        k_scale=scales[0],
        v_scale=scales[1],
        **({"value_dim": value_dim} if narrow else {}),
    )
    return out[:, :, :value_dim]


def _scales(spec: KVSpec, k_scale: Any, v_scale: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """(k_scale, v_scale) as float32[K], or Nones for a pool that has none."""
    given = {"k_scale": k_scale, "v_scale": v_scale}
    if spec.dtype.name not in QUANTIZED:
        for name, scale in given.items():
            if scale is not None:
                raise ValueError(f"{name} is given and the pool keeps {spec.dtype.name}: leave it out")
        return None, None
    scales = []
    for name, scale in given.items():
        if scale is None:
            raise ValueError(f"{name} is missing: a pool of {spec.dtype.name} needs this layer's scale")
        scale = jnp.asarray(scale, jnp.float32)
        if scale.shape not in ((), (spec.num_kv_heads,)):
            raise ValueError(
                f"{name} has shape {scale.shape}: it must be a number or ({spec.num_kv_heads},), one per KV head"
            )
        scales.append(jnp.broadcast_to(scale, (spec.num_kv_heads,)))
    return scales[0], scales[1]


def _stored(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x [T, K, D] as the pool keeps it."""
    if scale is None:
        return x.astype(dtype)
    largest = QUANTIZED[dtype.name]
    x = jnp.clip(x.astype(jnp.float32) / scale[:, None], -largest, largest)
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype)


def _choose(implementation: str, spec: KVSpec) -> tuple[str, Implementation]:
    return REGISTRY.choose(implementation, lambda member: _why_not(member, spec))


def _why_not(member: Implementation, spec: KVSpec) -> str | None:
    if spec.shared_values and not getattr(member, "SHARES_VALUES", False):
        return "it keeps keys and values apart"
    return member.why_not(spec)


def _of_pool(kv: Any, implementation: str) -> tuple[str, Implementation, KVSpec]:
    """The implementation whose layout `kv` has, and what the pool holds."""

    def why_not(member: Implementation) -> str | None:
        spec = member.kv_spec(kv)
        return (
            "kv does not have its layout (make it from kv_shape)" if spec is None else _why_not(member, spec)
        )

    name, chosen = REGISTRY.choose(implementation, why_not)
    spec = chosen.kv_spec(kv)
    assert spec is not None
    return name, chosen, spec


def _planned(
    kv: Any, batch: RaggedBatch | StepPlan, tokens: jax.Array, implementation: str, name: str
) -> tuple[StepPlan, KVSpec]:
    if tokens.ndim != 3:
        raise ValueError(f"{name} has shape {tokens.shape}: it must be [tokens, heads, head_dim]")
    if isinstance(batch, RaggedBatch):
        batch = prepare(batch, kv, tokens.shape[0], implementation=implementation)
    elif implementation not in (AUTO, batch.implementation):
        raise ImplementationError(
            f"implementation is {implementation!r} and the plan was prepared for {batch.implementation!r}: "
            "name the same one in both, or leave it automatic here"
        )
    return batch, _of_pool(kv, batch.implementation)[2]


def _check_dtype(name: str, dtype: Any, allowed: tuple[str, ...] = FLOATS) -> None:
    if jnp.dtype(dtype).name not in allowed:
        raise ValueError(f"{name} has dtype {jnp.dtype(dtype).name}: it must be one of {list(allowed)}")


def _check_batch(batch: RaggedBatch, num_tokens: int) -> None:
    rows = batch.max_rows
    if batch.query_starts.shape != (rows + 1,):
        raise ValueError(
            f"query_starts has shape {batch.query_starts.shape}: with {rows} rows it must be ({rows + 1},)"
        )
    if batch.page_table.ndim != 2 or batch.page_table.shape[0] != rows:
        raise ValueError(
            f"page_table has shape {batch.page_table.shape}: with {rows} rows it must be ({rows}, pages)"
        )
    for name in ("query_starts", "context_lens", "page_table", "num_decode_rows", "num_rows"):
        dtype = getattr(batch, name).dtype
        if dtype != jnp.int32:
            raise ValueError(f"{name} has dtype {dtype}: it must be int32")
    mask = batch.tree_mask
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != num_tokens or mask.shape[1] < 1):
        raise ValueError(
            f"tree_mask has shape {mask.shape}: with {num_tokens} tokens it must be ({num_tokens}, words)"
        )
    if mask is not None and mask.dtype != jnp.int32:
        raise ValueError(f"tree_mask has dtype {mask.dtype}: it must be int32")
    if batch.decode_only and num_tokens != rows:
        raise ValueError(f"decode_only is True with {num_tokens} tokens and {rows} rows: they must be equal")
