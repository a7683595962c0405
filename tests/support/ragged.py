"""Ragged steps made to order: a few static shapes, any contents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention.tpu_pages import TpuPool, lanes_of, value_lane


@dataclass(frozen=True)
class Row:
    """One live row: its new tokens, its context with them, and how many full pages it shares with the row before.

    parents: of a verification row, the new token that each new token but the first continues.
    """

    tokens: int
    context: int
    shared_pages: int = 0
    parents: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """What is static in a step."""

    num_rows: int = 6
    num_tokens: int = 48
    page_size: int = 8
    pages_per_row: int = 12
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    layers: int = 2
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    kv_dtype: str | None = None  # of the pool, where it is not dtype
    tree_words: int = 0  # of the tree mask; 0: the batch has none
    shared_values: bool = False  # v is k, and the pool keeps it once

    @property
    def quantized(self) -> bool:
        return self.kv_dtype in ("int8", "float8_e4m3fn")

    def scales(self, heads: int | None = None) -> dict[str, jax.Array]:
        """Arguments k_scale and v_scale, one number per head, where the pool needs them."""
        if not self.quantized:
            return {}
        step = 4.0 / (127.0 if self.kv_dtype == "int8" else 448.0)  # four standard deviations fit
        head = jnp.arange(heads or self.kv_heads, dtype=jnp.float32)
        return {"k_scale": step * (1.0 + 0.1 * head), "v_scale": step * (1.2 - 0.1 * head)}

    @property
    def pages_per_layer(self) -> int:
        return self.num_rows * self.pages_per_row + 1

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Step:
    shape: Shape
    rows: Sequence[Row]
    batch: pa.RaggedBatch
    q: jax.Array
    k: jax.Array
    v: jax.Array
    kv: jax.Array

    def owned(self) -> np.ndarray:
        """bool[pages_per_layer, S]: slots with a token that some row may read after this step."""
        owned = np.zeros((self.shape.pages_per_layer, self.shape.page_size), bool)
        for row, table in zip(self.rows, np.asarray(self.batch.page_table)):
            position = np.arange(row.context)
            owned[table[position // self.shape.page_size], position % self.shape.page_size] = True
        return owned

    def written(self) -> np.ndarray:
        """bool[pages_per_layer, S]: slots that this step writes."""
        written = np.zeros((self.shape.pages_per_layer, self.shape.page_size), bool)
        for row, table in zip(self.rows, np.asarray(self.batch.page_table)):
            position = np.arange(row.context - row.tokens, row.context)
            written[table[position // self.shape.page_size], position % self.shape.page_size] = True
        return written


def make_step(shape: Shape, decodes: Sequence[Row], chunks: Sequence[Row] = (), *, seed: int = 0) -> Step:
    """A step with the given rows, the rest padded; pages in random order; random numbers everywhere."""
    random = np.random.default_rng(seed)
    rows = [*decodes, *chunks]
    assert len(rows) <= shape.num_rows
    assert sum(row.tokens for row in rows) <= shape.num_tokens
    free = list(random.permutation(np.arange(1, shape.pages_per_layer)))
    table = np.zeros((shape.num_rows, shape.pages_per_row), np.int32)
    for index, row in enumerate(rows):
        count = -(-row.context // shape.page_size)
        table[index, : row.shared_pages] = table[index - 1, : row.shared_pages]
        table[index, row.shared_pages : count] = [free.pop() for _ in range(count - row.shared_pages)]
    lengths = [row.tokens for row in rows] + [0] * (shape.num_rows - len(rows))
    contexts = [row.context for row in rows] + [0] * (shape.num_rows - len(rows))
    batch = pa.RaggedBatch(
        query_starts=jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32),
        context_lens=jnp.asarray(contexts, jnp.int32),
        page_table=jnp.asarray(table),
        num_decode_rows=jnp.int32(len(decodes)),
        num_rows=jnp.int32(len(rows)),
        decode_only=shape.num_tokens == shape.num_rows,
        tree_mask=_tree_mask(shape, rows) if shape.tree_words else None,
    )

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(size), shape.dtype)

    # Every implementation is given the same pool, in the layout of the reference.
    pool = pa.kv_shape(
        shape.layers * shape.pages_per_layer,
        shape.page_size,
        shape.kv_heads,
        shape.head_dim,
        shape.kv_dtype or shape.dtype,
        shared_values=shape.shared_values,
        implementation="reference",
    )
    kept = normal(*pool.shape)
    if shape.quantized:
        kept = kept.astype(jnp.float32) / (4.0 / (127.0 if shape.kv_dtype == "int8" else 448.0))
        kept = jnp.round(jnp.clip(kept, -127.0, 127.0))
    k = normal(shape.num_tokens, shape.kv_heads, shape.head_dim)
    return Step(
        shape=shape,
        rows=rows,
        batch=batch,
        q=normal(shape.num_tokens, shape.heads, shape.head_dim),
        k=k,
        v=k if shape.shared_values else normal(shape.num_tokens, shape.kv_heads, shape.head_dim),
        kv=kept.astype(pool.dtype),
    )


def _tree_mask(shape: Shape, rows: Sequence[Row]) -> jax.Array:
    bits = np.ones((shape.num_tokens, 32 * shape.tree_words), np.uint64)
    token = 0
    for row in rows:
        if row.parents is not None:
            seen = np.zeros((row.tokens, 32 * shape.tree_words), np.uint64)
            for index in range(row.tokens):
                if index:
                    seen[index] = seen[row.parents[index - 1]]
                seen[index, index] = 1
            bits[token : token + row.tokens] = seen
        token += row.tokens
    words = bits.reshape(shape.num_tokens, shape.tree_words, 32) << np.arange(32, dtype=np.uint64)
    return jnp.asarray(words.sum(axis=2).astype(np.uint32).view(np.int32))


class Runner:
    """Writes and attends one layer; one compilation per implementation and static shape."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Any] = {}

    def clear(self) -> None:
        self._compiled.clear()

    def __call__(self, step: Step, implementation: str, layer: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(output [T, H, D], kv), both as float32."""
        shape = step.shape
        key = (implementation, repr(shape))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(_write_and_attend(shape, implementation))
        offset = jnp.int32(layer * shape.pages_per_layer)
        kv = tpu_pool(step.kv) if implementation == "tpu" else step.kv
        output, kv = self._compiled[key](step.q, step.k, step.v, kv, step.batch, offset)
        kv = plain_pool(kv) if implementation == "tpu" else kv
        return np.asarray(output, np.float32), np.asarray(kv, np.float32)


def tpu_pool(kv: jax.Array) -> TpuPool:
    """A pool [P, 2, K, S, D], or [P, 1, K, S, D] of shared values, in the layout of the TPU kernels."""
    head_dim, shared = kv.shape[4], kv.shape[1] == 1
    slabs, lanes = lanes_of(head_dim, shared)
    half = value_lane(head_dim, shared) or lanes
    padded = np.zeros((*kv.shape[:4], half), kv.dtype)
    padded[..., :head_dim] = kv
    if not shared and slabs == 1:
        padded = np.concatenate([padded[:, :1], padded[:, 1:]], 4)
    return TpuPool(jnp.asarray(padded), head_dim, shared)


def plain_pool(kv: TpuPool) -> np.ndarray:
    """The pool in the layout of the reference."""
    pages, start = np.asarray(kv.pages), value_lane(kv.head_dim)
    if kv.shared_values:
        return pages[..., : kv.head_dim]
    values = pages[:, -1:, :, :, start : start + kv.head_dim]
    return np.concatenate([pages[:, :1, :, :, : kv.head_dim], values], axis=1)


def _write_and_attend(shape: Shape, implementation: str):
    options: dict[str, Any] = {**shape.options, **shape.scales()}
    if options.pop("sinks", False):
        options["sinks"] = jnp.linspace(-1.0, 2.0, shape.heads, dtype=jnp.float32)

    scales = shape.scales()

    def whole(q, k, v, kv, batch, offset):
        kv = pa.write_kv(kv, k, v, batch, page_offset=offset, implementation=implementation, **scales)
        options_here = {"page_offset": offset, "scale": shape.scale, "implementation": implementation}
        return pa.attend(q, kv, batch, **options_here, **options), kv

    return whole
