"""Paged attention on CPU by the native kernels: every page is read once, at memory speed.

The pool's layout is the XLA path's, [P, 2 or 1, K, S, D], so the two can take over from each other. What the kernels do not
know (a tree mask) goes to the XLA path.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.dispatch import current_platform
from pallas_kernels.paged_attention import xla
from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch
from pallas_kernels.paged_attention.xla import kv_partition_spec, kv_shape, kv_spec

__all__ = ["attend", "kv_partition_spec", "kv_shape", "kv_spec", "prepare", "why_not", "write_kv"]

SHARES_VALUES = True
LANES = 16  # floats in the widest vector register that the kernels use


def why_not(spec: KVSpec) -> str | None:
    if current_platform() != "cpu":
        return f"it runs on CPU, and jax runs on {current_platform()}"
    if spec.dtype != jnp.float32:
        return f"the pool has dtype {spec.dtype}: the native kernels take float32"
    if spec.head_dim % LANES:
        return f"head_dim is {spec.head_dim}: the native kernels take multiples of {LANES}"
    return native.load()


def prepare(batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> Any:
    return batch if batch.tree_mask is None else xla.prepare(batch, num_tokens, spec)


def write_kv(kv, k, v, plan: Any, *, page_offset):
    if not isinstance(plan, RaggedBatch):
        return xla.write_kv(kv, k, v, plan, page_offset=page_offset)
    call = jax.ffi.ffi_call(
        "pallas_kernels_write_kv", jax.ShapeDtypeStruct(kv.shape, kv.dtype), input_output_aliases={0: 0}
    )
    return call(kv, k, v, plan.query_starts, plan.context_lens, plan.page_table, page_offset)


def attend(q, kv, plan: Any, *, page_offset, scale, sliding_window, soft_cap, sinks, k_scale, v_scale):
    if not isinstance(plan, RaggedBatch):
        return xla.attend(
            q,
            kv,
            plan,
            page_offset=page_offset,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    call = jax.ffi.ffi_call("pallas_kernels_attend", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    out = call(
        q.astype(jnp.float32),
        kv,
        plan.query_starts,
        plan.context_lens,
        plan.page_table,
        page_offset,
        jnp.zeros((0,), jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(scale),
        window=np.int32(sliding_window or 0),
        cap=np.float32(soft_cap or 0.0),
    )
    return out.astype(q.dtype)
