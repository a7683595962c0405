"""What is timed: each case with real arrays, the least that a device must do for it, and jax's own way to do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention as fa
from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import api as pa_api
from tools.kernel_cases import Case, num_tokens, read_heads

Step = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Work:
    """One program to time: `step(carry, constants)`, whose carry starts as given."""

    step: Step
    carry: Any
    constants: Any


@dataclass(frozen=True)
class Least:
    """What no implementation can do without."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, rate: float) -> tuple[float, str]:
        """The limit and what sets it."""
        moving, computing = self.bytes / bandwidth, self.flops / rate
        return (moving, "bandwidth") if moving >= computing else (computing, "matmul rate")


def cases(implementation: str) -> list[Case]:
    """Decode of 64 rows at 4k, a mixed step, and prefill of 8k."""
    found = []
    llama, gemma = read_heads("llama-3-8b"), read_heads("gemma-2-9b")
    for heads in (llama, read_heads("llama-3-70b").share(8), gemma):
        found.append(Case("paged_attention", "decode", heads, implementation, context=4096))
    found.append(Case("paged_attention", "decode", llama, implementation, context=4096, kv_dtype="int8"))
    # One long sequence alone: a kernel that gives a row to a core leaves the others idle.
    found.append(Case("paged_attention", "decode", llama, implementation, rows=1, context=131072))
    found.append(Case("paged_attention", "mixed", llama, implementation, rows=16, context=4096, tokens=2048))
    for heads in (llama, gemma):
        found.append(Case("flash_attention", "prefill", heads, implementation, rows=1, context=8192))
    return found


def least(case: Case) -> Least:
    heads = case.heads
    if case.op == "flash_attention":
        pairs = case.rows * visible_pairs(case.context, case.context, heads.window)
        kept = 2 * case.rows * case.context * heads.kv_heads * heads.head_dim * 2
        moved = 2 * case.rows * case.context * heads.heads * heads.head_dim * 2
    else:
        queries = row_queries(case)
        pairs = sum(visible_pairs(count, case.context, heads.window) for count in queries)
        item = 1 if case.kv_dtype in pa_api.QUANTIZED else jnp.dtype(case.kv_dtype).itemsize
        seen = [min(case.context, (heads.window or case.context) + count - 1) for count in queries]
        kept = 2 * sum(seen) * heads.kv_heads * heads.head_dim * item
        moved = 2 * sum(queries) * heads.heads * heads.head_dim * 2
    return Least(bytes=kept + moved, flops=4.0 * pairs * heads.heads * heads.head_dim)


def visible_pairs(queries: int, context: int, window: int | None) -> int:
    """(query, key) pairs of the last `queries` tokens of `context`, causal and windowed."""
    seen = np.arange(context - queries + 1, context + 1, dtype=np.int64)
    return int(np.minimum(seen, window or context).sum())


def row_queries(case: Case) -> list[int]:
    """Query tokens of each row: a mixed step has half its rows decoding and shares the other tokens out."""
    if case.phase == "decode":
        return [1] * case.rows
    chunks = max(case.rows // 2, 1)
    decodes = case.rows - chunks
    return [1] * decodes + [(case.tokens - decodes) // chunks] * chunks


def make(case: Case) -> Work:
    """The case's own kernel on random arrays. Attention gives its queries' shape, so it is its own next input."""
    if case.op == "flash_attention":
        q, k, v = _dense(case)

        def attend(q, kv):
            return fa.attend(
                q,
                *kv,
                scale=case.heads.head_dim**-0.5,
                sliding_window=case.heads.window,
                soft_cap=case.heads.soft_cap,
                implementation=case.implementation,
            )

        return Work(attend, q, (k, v))
    return _paged(case)


def _dense(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads = case.heads
    shapes = [(case.rows, case.context, count, heads.head_dim) for count in (heads.heads, heads.kv_heads)]
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], shapes[0], jnp.bfloat16)
    k, v = (jax.random.normal(key, shapes[1], jnp.bfloat16) for key in keys[1:])
    return q, k, v


def _paged(case: Case) -> Work:
    heads, name = case.heads, case.implementation
    per_row = -(-case.context // case.page_size)
    pages = case.rows * per_row + 1
    shapes = pa.kv_shape(
        pages, case.page_size, heads.kv_heads, heads.head_dim, case.kv_dtype, implementation=name
    )
    kv = jax.tree.map(lambda shape: _pool(shape), shapes)
    scales: dict[str, Any] = {"k_scale": 0.02, "v_scale": 0.02} if case.kv_dtype in pa_api.QUANTIZED else {}
    batch, tokens = make_batch(case), num_tokens(case)

    def attend(q, constants):
        kv, batch = constants
        return pa.attend(
            q,
            kv,
            batch,
            page_offset=0,
            scale=heads.head_dim**-0.5,
            sliding_window=heads.window,
            soft_cap=heads.soft_cap,
            implementation=name,
            **scales,
        )

    q = jax.random.normal(jax.random.key(2), (tokens, heads.heads, heads.head_dim), jnp.bfloat16)
    return Work(attend, q, (kv, batch))


def _pool(shape: Any) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jax.random.randint(jax.random.key(3), shape.shape, -100, 100, jnp.int8).astype(shape.dtype)
    return jax.random.normal(jax.random.key(3), shape.shape, jnp.bfloat16).astype(shape.dtype)


def make_batch(case: Case) -> pa.RaggedBatch:
    """Rows of full context with their pages in random order, as a pool is after a while."""
    queries = row_queries(case)
    per_row = -(-case.context // case.page_size)
    order = np.random.default_rng(0).permutation(case.rows * per_row) + 1
    return pa.RaggedBatch(
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(queries)]), jnp.int32),
        context_lens=jnp.full((case.rows,), case.context, jnp.int32),
        page_table=jnp.asarray(order.reshape(case.rows, per_row), jnp.int32),
        num_decode_rows=jnp.int32(sum(count == 1 for count in queries)),
        num_rows=jnp.int32(case.rows),
        decode_only=case.phase == "decode",
    )


def alternative(case: Case) -> tuple[str, Work]:
    """jax's own for the same work, and its name.

    Raises:
      NotImplementedError: jax has none.
    """
    if case.op == "flash_attention":
        return _jax_dense(case)
    if case.implementation == "tpu" and case.kv_dtype == "bfloat16":
        return "jax ragged_paged_attention", _jax_ragged(case)
    if case.phase == "decode" and case.kv_dtype == "bfloat16" and case.heads.window is None:
        return _jax_gathered(case)
    raise NotImplementedError("jax has none for this")


def _jax_dense(case: Case) -> tuple[str, Work]:
    if case.heads.soft_cap is not None:
        raise NotImplementedError("jax.nn.dot_product_attention has no soft cap")
    q, k, v = _dense(case)
    name = "cudnn" if case.implementation == "gpu" else "xla"
    window = None if case.heads.window is None else (case.heads.window - 1, 0)

    def attend(q, kv):
        return jax.nn.dot_product_attention(
            q, *kv, is_causal=True, local_window_size=window, implementation=name
        )

    return f"jax.nn.dot_product_attention ({name})", Work(attend, q, (k, v))


def _jax_ragged(case: Case) -> Work:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    heads, batch = case.heads, make_batch(case)
    pages = case.rows * -(-case.context // case.page_size) + 1
    shape = (pages, case.page_size, 2 * heads.kv_heads, heads.head_dim)
    kv = jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)

    def attend(q, constants):
        kv, batch = constants
        return ragged_paged_attention(
            q,
            kv,
            batch.context_lens,
            batch.page_table,
            batch.query_starts,
            batch.num_rows[None],
            sm_scale=heads.head_dim**-0.5,
            sliding_window=heads.window,
            soft_cap=heads.soft_cap,
            vmem_limit_bytes=64 * 1024 * 1024,
        )

    q = jax.random.normal(jax.random.key(2), (num_tokens(case), heads.heads, heads.head_dim), jnp.bfloat16)
    return Work(attend, q, (kv, batch))


def _jax_gathered(case: Case) -> tuple[str, Work]:
    """Decode over keys that already lie side by side: easier than paged, and what jax offers on a GPU."""
    dense = replace(case, op="flash_attention")
    _, k, v = _dense(dense)
    heads = case.heads
    q = jax.random.normal(jax.random.key(2), (case.rows, heads.heads, heads.head_dim), jnp.bfloat16)

    def attend(q, kv):
        return jax.nn.dot_product_attention(q[:, None], *kv)[:, 0]

    return "jax.nn.dot_product_attention, not paged", Work(attend, q, (k, v))
