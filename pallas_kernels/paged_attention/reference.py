"""Paged attention written to be read: dense, float32, one token at a time. The oracle of every other implementation.

KV layout: [P, 2, K, S, D], the XLA path's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch, tree_allows
from pallas_kernels.paged_attention.xla import kv_partition_spec, kv_shape, kv_spec

__all__ = ["attend", "kv_partition_spec", "kv_shape", "kv_spec", "prepare", "why_not", "write_kv"]


SHARES_VALUES = True


def why_not(spec: KVSpec) -> str | None:
    return None


def prepare(batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> RaggedBatch:
    return batch


def write_kv(kv, k, v, batch: RaggedBatch, *, page_offset):
    page, slot = batch.token_slots(k.shape[0], kv.shape[3])
    kept = jnp.stack([k, v][: kv.shape[1]], axis=1)
    return kv.at[page + page_offset, :, :, slot].set(kept.astype(kv.dtype))


def attend(
    q, kv, batch: RaggedBatch, *, page_offset, scale, sliding_window, soft_cap, sinks, k_scale, v_scale
):
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    rows = batch.token_rows(num_tokens)
    positions = batch.token_positions(num_tokens)

    scales = [jnp.ones(num_kv_heads) if x is None else x for x in (k_scale, v_scale)]
    tree = batch.tree_mask if batch.tree_mask is not None else jnp.full((num_tokens, 1), -1, jnp.int32)

    def one_token(token):
        query, row, position, words = token
        pages = kv[batch.page_table[row] + page_offset].astype(jnp.float32)
        keys, values = (
            pages[:, min(i, kv.shape[1] - 1)].swapaxes(1, 2).reshape(-1, num_kv_heads, head_dim)
            * scales[i][:, None]
            for i in (0, 1)
        )
        keys, values = (jnp.repeat(x, num_heads // num_kv_heads, axis=1) for x in (keys, values))
        logits = jnp.einsum("hd,lhd->hl", query.astype(jnp.float32), keys, precision="highest") * scale
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        key_position = jnp.arange(keys.shape[0])
        visible = key_position <= position
        if sliding_window is not None:
            visible &= position - key_position < sliding_window
        first_new = batch.context_lens[row] - (batch.query_starts[row + 1] - batch.query_starts[row])
        visible &= tree_allows(list(words), key_position - first_new, position - first_new)
        logits = jnp.where(visible, logits, -jnp.inf)
        if sinks is not None:  # a sink takes part in the softmax and has no value
            logits = jnp.concatenate([logits, sinks.astype(jnp.float32)[:, None]], axis=1)
        weights = jax.nn.softmax(logits, axis=1)[:, : keys.shape[0]]
        # A page may hold anything, NaN too, where no token was written.
        values = jnp.where(visible[:, None, None], values, 0.0)
        return jnp.einsum("hl,lhd->hd", weights, values, precision="highest").astype(q.dtype)

    output = jax.lax.map(one_token, (q, rows, positions, tree))
    live = jnp.arange(num_tokens) < batch.num_tokens
    return jnp.where(live[:, None, None], output, 0)
