"""Pages on a TPU: the pool's layout, and the copies that bring a block of a row's pages into VMEM.

The pool is [P, C, K, S, L]. One page of one KV head is a [S, L] slab whose last two axes are whole tiles, so a block of
pages of one head is already the [tokens, L] operand of a matrix product: no head is picked out of interleaved rows, and
no page is re-laid. L is the head size rounded up to 128 lanes. Up to 64 lanes, keys and values share one slab (C = 1, keys
in the lower lanes, values in the upper): queries get zeros in the upper lanes, so q [k | v]^T = q k^T, and of p [k | v]
the upper lanes are p v. Then a head of 64 wastes nothing. Above 64, C = 2: keys, values.

Where values are the keys (latent attention), C = 1 whatever the head size, and one slab is fetched once and multiplied
twice. Its lanes are rounded up too: a latent of 576 numbers takes 640, since the chip's own tiles are 128 wide and would
pad it in memory anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
HALF = LANES // 2
MASKED = -1e30  # stands for minus infinity where a difference of two of them must stay finite
LOG2_E = (
    1.4426950408889634  # exponentials are powers of two: e^x = 2^(x log2 e), the factor goes into the queries
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TpuPool:
    """KV pages [P, C, K, S, L] of heads of `head_dim`; see the head of this file."""

    pages: Any  # jax.Array, or what stands for one: a shape, a sharding
    head_dim: int = field(metadata={"static": True})
    shared_values: bool = field(default=False, metadata={"static": True})


def lanes_of(head_dim: int, shared_values: bool = False) -> tuple[int, int]:
    """(C, L) of a head size."""
    lanes = -(-head_dim // LANES) * LANES
    return (1, lanes) if shared_values or head_dim <= HALF else (2, lanes)


def value_lane(head_dim: int, shared_values: bool = False) -> int:
    """The lane of its slab in which a value begins."""
    return HALF if head_dim <= HALF and not shared_values else 0


def sublanes(dtype: Any) -> int:
    """Rows of one tile of this dtype: 8 of 32 bits, 16 of 16 bits, 32 of 8 bits."""
    return 32 // jnp.dtype(dtype).itemsize


def joined(k: jax.Array, v: jax.Array, shared_values: bool = False) -> jax.Array:
    """k and v [T, K, D] as rows of the pool's slabs: [T, C * K, L]."""
    head_dim = k.shape[2]
    num_slabs, lanes = lanes_of(head_dim, shared_values)
    if shared_values:
        return jnp.pad(k, ((0, 0), (0, 0), (0, lanes - head_dim)))
    half = HALF if num_slabs == 1 else lanes
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, half - head_dim))) for x in (k, v))
    return jnp.concatenate([k, v], axis=3 - num_slabs)


@dataclass(frozen=True)
class BlockCopies:
    """Starts and awaits the copies of one block of a row's pages.

    Attributes:
      table: int32[R * MP] in SMEM. row_pages: MP.
      offset: int32[], added to every page id.
      pool: [P, C, K, S, L] in HBM. buffer: [N, BP, C, K', S, L] in VMEM. semaphores: DMA [N].
      first_head: of the K' KV heads that are copied: where a chip's two cores act as one device, each takes its half.
    """

    table: Any
    row_pages: int
    offset: Any
    pool: Any
    buffer: Any
    semaphores: Any
    first_head: Any

    @property
    def pages(self) -> int:
        return self.buffer.shape[1]

    def span(self, block: Any, low: Any, high: Any) -> tuple[Any, Any]:
        """The pages of a block, [first, end) within it, that hold a position in [low, high)."""
        page_size = self.buffer.shape[4]
        first = jnp.clip(low // page_size - block * self.pages, 0, self.pages)
        end = jnp.clip((high + page_size - 1) // page_size - block * self.pages, 0, self.pages)
        return first, end

    def _copy(self, row: Any, block: Any, index: Any, slot: Any) -> Any:
        page = self.table[row * self.row_pages + block * self.pages + index] + self.offset
        return pltpu.make_async_copy(
            self._source(page, self.first_head), self.buffer.at[slot, index], self.semaphores.at[slot]
        )

    def _source(self, pages: Any, first_head: Any) -> Any:
        num_heads = self.buffer.shape[3]
        if num_heads == self.pool.shape[2]:
            return self.pool.at[pages]
        return self.pool.at[pages, :, pl.ds(first_head, num_heads)]

    def start(self, row: Any, block: Any, slot: Any, low: Any, high: Any) -> None:
        first, end = self.span(block, low, high)
        whole = end - first == self.pages

        @pl.when(whole)
        def _():
            # Written out, so that the scalar unit looks one page up while another's copy is being issued.
            for index in range(self.pages):
                self._copy(row, block, index, slot).start()

        @pl.when(jnp.logical_not(whole))
        def _():
            @pl.loop(first, end)
            def _(index):
                self._copy(row, block, index, slot).start()

    def wait(self, block: Any, slot: Any, low: Any, high: Any) -> None:
        first, end = self.span(block, low, high)
        whole = end - first == self.pages

        @pl.when(whole)
        def _():  # one wait for as many bytes as all the pages have
            source = self._source(pl.ds(0, self.pages), 0)
            pltpu.make_async_copy(source, self.buffer.at[slot], self.semaphores.at[slot]).wait()

        @pl.when(jnp.logical_not(whole))
        def _():
            @pl.loop(first, end)
            def _(index):
                pltpu.make_async_copy(
                    self._source(0, 0), self.buffer.at[slot, index], self.semaphores.at[slot]
                ).wait()


def work_dtype(pool_dtype: Any) -> Any:
    """What the matrix products take: float32 of a float32 pool, else bfloat16."""
    return jnp.float32 if jnp.dtype(pool_dtype) == jnp.float32 else jnp.bfloat16


def product(a: jax.Array, b: jax.Array, *, transposed: bool) -> jax.Array:
    """a @ b, or a @ b.T, in float32; b in a's dtype. Float32 operands are multiplied in full precision."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def spread(column: jax.Array, lanes: int) -> jax.Array:
    """A [M, 128] array of equal lanes as [M, lanes], which takes no instruction where lanes is a multiple of 128."""
    whole, rest = divmod(lanes, LANES)
    return jnp.concatenate([*[column] * whole, *([column[:, :rest]] if rest else [])], axis=1)
