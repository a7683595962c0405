"""Paged attention in plain XLA: the fast path on CPU, and the path of devices that no kernel serves.

KV layout: [P, 2, K, S, D]. One page of one head is contiguous, so a page is fetched straight into the [K, tokens, D]
order that XLA's batched products read at memory speed. Measured on CPU, the layout [P, S, 2, K, D] makes the whole
decode step two to three times slower.

How it runs:

* Decode rows are sorted by context length and taken a few at a time; each group loops over blocks of KV tokens up to
  its own longest row, with an online softmax. Groups are small so that a block stays in the cache between being
  fetched and being multiplied.
* Prompt chunks are cut into tiles of queries; each tile loops over the blocks of its row up to its last query.
* Every loop is bounded by live rows, tiles and contexts, so padding costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pallas_kernels.dispatch import current_platform
from pallas_kernels.paged_attention.batch import KVSpec, RaggedBatch, tree_allows
from pallas_kernels.paged_attention.xla_plan import Plan, make_plan

NEGATIVE = -1e30  # stands for minus infinity where a difference of two of them must stay finite


@dataclass(frozen=True)
class Blocks:
    """Sizes of the loops, all static.

    Attributes:
      decode_rows: decode rows per group.
      decode_tokens: KV tokens per step of a group's loop.
      tile_queries: query tokens per tile of a prompt chunk.
      tile_tokens: KV tokens per step of a tile's loop.
      fenced: fetched blocks are kept apart from their reshape (see `_fence`).
    """

    decode_rows: int
    decode_tokens: int
    tile_queries: int
    tile_tokens: int
    fenced: bool


def choose_blocks(num_kv_heads: int, head_dim: int, max_rows: int, num_tokens: int) -> Blocks:
    """Block sizes for this platform and one device's share of the heads.

    On CPU a block of keys and a block of values, as float32, should together stay well inside one core's second-level
    cache (2 MB where these numbers were measured), and be large enough that starting an operation is little beside it.
    """
    if current_platform() != "cpu":
        return Blocks(max_rows, 128, min(128, num_tokens), 256, fenced=False)
    token_bytes = num_kv_heads * head_dim * 4
    budget = 384 * 1024
    rows = min(max_rows, _power_of_two(budget // (64 * token_bytes)))
    most = 256 if max_rows == 1 else 128
    tokens = min(most, max(32, _power_of_two(budget // (rows * token_bytes))))
    return Blocks(rows, tokens, min(64, num_tokens), 64, fenced=True)


def _power_of_two(value: int) -> int:
    """The largest power of two that is not above value, and at least 1."""
    return 1 << max(value.bit_length() - 1, 0)


SHARES_VALUES = True  # a pool [P, 1, K, S, D] keeps one array per token, its key and its value


def why_not(spec: KVSpec) -> str | None:
    return None


def kv_shape(spec: KVSpec) -> jax.ShapeDtypeStruct:
    shape = (spec.num_pages, 1 if spec.shared_values else 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    return jax.ShapeDtypeStruct(shape, spec.dtype)


def kv_partition_spec(tensor_axis: str | None) -> PartitionSpec:
    return PartitionSpec(None, None, tensor_axis, None, None)


def kv_spec(kv) -> KVSpec | None:
    if getattr(kv, "ndim", None) != 5 or kv.shape[1] not in (1, 2):
        return None
    pages, halves, heads, page_size, head_dim = kv.shape
    return KVSpec(pages, page_size, heads, head_dim, kv.dtype, halves == 1)


def prepare(batch: RaggedBatch, num_tokens: int, spec: KVSpec) -> Plan:
    blocks = choose_blocks(spec.num_kv_heads, spec.head_dim, batch.max_rows, num_tokens)
    return make_plan(batch, num_tokens, spec.page_size, blocks.tile_queries)


def write_kv(kv, k, v, plan: Plan, *, page_offset):
    """Decode rows are written token by token, prompt chunks page by page: each write is one small copy in place.

    XLA's scatter on CPU is a slow loop over single tokens. The slots of a page behind a row's last token are set to
    zero when the row starts the page. Masked keys get weight 0, and 0 times a NaN that an earlier owner left there
    would still be NaN.
    """
    page_size, kept = kv.shape[3], (k, v)[: kv.shape[1]]
    offset = _opaque(page_offset, plan)
    first_slot = jnp.arange(page_size)[:, None] == 0

    def token_of(row):
        new = jnp.stack([lax.dynamic_index_in_dim(x, row, keepdims=False) for x in kept])
        return new[None, :, :, None]

    def start_page(index, kv):
        # With the token, though it is written again below: a page of zeros alone would not depend on this layer's
        # keys, so it could be written before the layer below has read the pool, and XLA would copy the pool.
        row = plan.fresh[index]
        page = jnp.where(first_slot, token_of(row), jnp.zeros((), kv.dtype))
        return lax.dynamic_update_slice(kv, page, (plan.pages[row] + offset, 0, 0, 0, 0))

    def one_token(row, kv):
        return lax.dynamic_update_slice(
            kv, token_of(row), (plan.pages[row] + offset, 0, 0, plan.slots[row], 0)
        )

    kv = lax.fori_loop(0, plan.num_fresh, start_page, kv)
    kv = lax.fori_loop(0, plan.batch.num_decode_rows, one_token, kv)
    if plan.batch.decode_only:
        return kv

    def one_page(item, kv):
        token = plan.write_starts[item] + jnp.arange(page_size, dtype=jnp.int32)
        new = jnp.stack(
            [x.at[jnp.clip(token, 0, x.shape[0] - 1)].get(mode="promise_in_bounds") for x in kept]
        )
        at = (plan.write_pages[item] + offset, 0, 0, 0, 0)
        old = lax.dynamic_slice(kv, at, (1, *kv.shape[1:]))
        before, mine = token < plan.write_low[item], token < plan.write_high[item]
        page = jnp.where(mine[:, None], jnp.swapaxes(new, 1, 2)[None], jnp.zeros((), kv.dtype))
        return lax.dynamic_update_slice(kv, jnp.where(before[:, None], old, page), at)

    return lax.fori_loop(0, plan.num_writes, one_page, kv)


def _opaque(page_offset, plan: Plan):
    """The offset as a value that the compiler does not know.

    The layers of an unrolled program then have identical kernels, and XLA compiles each of them once: measured on
    12 layers, half the compile time.
    """
    return jnp.asarray(page_offset, jnp.int32) + plan.never


def _fence(x, plan: Plan, blocks: Blocks):
    """x, kept apart from what comes after it: the compiler must store it in this very shape.

    A copy of rows of S * D numbers becomes wide moves. Fused with a reshape to [.., D], XLA's CPU compiler unrolls it
    into single-number moves, at half the speed. A loop that never runs is the one barrier that all its passes respect
    (`optimization_barrier` is gone before fusion), and costs nothing.
    """
    return lax.fori_loop(0, plan.never, lambda _, y: y + 1, x) if blocks.fenced else x


def attend(q, kv, plan: Plan, *, page_offset, scale, sliding_window, soft_cap, sinks, k_scale, v_scale):
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    blocks = choose_blocks(num_kv_heads, head_dim, plan.batch.max_rows, num_tokens)
    heads = (num_kv_heads, num_heads // num_kv_heads)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, *heads)
    unscale = None
    if (
        k_scale is not None
    ):  # keys times k_scale are queries times k_scale, and values the same with the output
        scale, unscale = (jnp.repeat(x, heads[1])[:, None] for x in (scale * k_scale, v_scale))
    run = partial(
        _attend_blocks,
        kv=kv,
        plan=plan,
        blocks=blocks,
        offset=_opaque(page_offset, plan),
        window=sliding_window,
        soft_cap=soft_cap,
    )
    output = _attend_decodes(q, plan, blocks, run, heads, scale, sinks)
    output = output if unscale is None else output * unscale
    if plan.batch.decode_only:
        return output[plan.rank].astype(q.dtype)
    token = jnp.arange(num_tokens)
    rank = plan.rank[jnp.minimum(token, plan.batch.max_rows - 1)]
    decodes = token < plan.batch.num_decode_rows
    output = jnp.where(decodes[:, None, None], output[rank], 0.0).astype(q.dtype)
    return _attend_tiles(q, output, plan, blocks, run, heads, scale, unscale, sinks)


def _attend_decodes(q, plan: Plan, blocks: Blocks, run, heads, scale, sinks):
    """Returns float32 [N, H, D] in the order of the sorted rows, N = R rounded up to whole groups."""
    size, shape = blocks.decode_rows, q.shape[1:]
    padding = -plan.batch.max_rows % size
    num_rows = plan.batch.max_rows + padding
    lasts = jnp.pad(plan.lasts, (0, padding), constant_values=-1)
    table = jnp.pad(plan.table, ((0, padding), (0, 0)))
    q = q[jnp.pad(plan.order, (0, padding))].astype(jnp.float32) * scale
    q = q.reshape(num_rows, *heads, shape[1])

    def group(start):
        rows = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        result = run(rows(q), rows(lasts)[:, None], rows(table), sinks=sinks, block=blocks.decode_tokens)
        return result.reshape(size, *shape)

    if num_rows == size:
        return group(0)

    def step(index, output):
        return lax.dynamic_update_slice_in_dim(output, group(index * size), index * size, 0)

    num_groups = (plan.batch.num_decode_rows + size - 1) // size
    return lax.fori_loop(0, num_groups, step, jnp.zeros((num_rows, *shape), jnp.float32))


def _attend_tiles(q, output, plan: Plan, blocks: Blocks, run, heads, scale, unscale, sinks):
    """Fills in the prompt chunks' rows of output [T, H, D]."""
    batch, size = plan.batch, plan.tile
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, groups = heads
    if sinks is not None:
        sinks = jnp.repeat(sinks, size, axis=2)

    def one_tile(item, output):
        row, first = plan.tile_rows[item], plan.tile_starts[item]
        end = batch.query_starts[row + 1]
        # The last tile may reach past the array. It is moved back, and the tokens before `first` are not its own.
        start = jnp.minimum(first, num_tokens - size)
        token = start + jnp.arange(size, dtype=jnp.int32)
        mine = (token >= first) & (token < end)
        position = jnp.where(mine, batch.context_lens[row] - end + token, -1)
        tree = None
        if batch.tree_mask is not None:
            words = lax.dynamic_slice_in_dim(batch.tree_mask, start, size)
            first_new = batch.context_lens[row] - (end - batch.query_starts[row])
            tree = (jnp.tile(words, (groups, 1))[None], first_new)
        tile = lax.dynamic_slice_in_dim(q, start, size).astype(jnp.float32) * scale
        tile = tile.reshape(size, num_kv_heads, groups, head_dim).transpose(1, 2, 0, 3)
        result = run(
            tile.reshape(1, num_kv_heads, groups * size, head_dim),
            jnp.tile(position, groups)[None],
            lax.dynamic_slice_in_dim(batch.page_table, row, 1),
            sinks=sinks,
            block=blocks.tile_tokens,
            tree=tree,
        )
        result = result.reshape(num_kv_heads, groups, size, head_dim).transpose(2, 0, 1, 3)
        result = result.reshape(size, num_heads, head_dim)
        result = (result if unscale is None else result * unscale).astype(output.dtype)
        old = lax.dynamic_slice_in_dim(output, start, size)
        return lax.dynamic_update_slice_in_dim(output, jnp.where(mine[:, None, None], result, old), start, 0)

    return lax.fori_loop(0, plan.num_tiles, one_tile, output)


def _attend_blocks(
    q, position, table, *, kv, plan: Plan, blocks: Blocks, offset, window, soft_cap, sinks, block, tree=None
):
    """Softmax attention of queries over their row's pages, a block of KV tokens at a time.

    Args:
      q: float32 [N, K, M, D], scaled: M queries (or query heads) of each of N rows.
      position: int32 [N, M] or [N, 1], what each query sees: its own position and before; -1 sees nothing.
      table: int32 [N, MP].
      sinks: float32 [1, K, M] or None.
      block: KV tokens per step.
      tree: (int32 [N, M, W] tree masks, position of the first new token), or None.

    Returns:
      float32 [N, K, M, D]; 0 where a query sees nothing.
    """
    num_rows, num_kv_heads, num_queries, head_dim = q.shape
    page_size = kv.shape[3]
    pages = max(1, min(block // page_size, table.shape[1]))
    block = pages * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))
    # One row per page, half (keys, values) and head.
    flat = kv.reshape(-1, page_size * head_dim)
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]

    def fetch(ids, half):
        rows = ((ids[:, None] + offset) * kv.shape[1] + half) * num_kv_heads + heads
        found = flat.at[rows].get(mode="promise_in_bounds").astype(jnp.float32)
        return _fence(found, plan, blocks).reshape(num_rows, num_kv_heads, block, head_dim)

    def step(index, carry):
        top, total, acc = carry
        ids = lax.dynamic_slice_in_dim(table, index * pages, pages, 1)
        keys = fetch(ids, 0)
        logits = jnp.einsum("nkmd,nksd->nkms", q, keys, precision="highest")
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        distance = position[:, :, None] - (index * block + jnp.arange(block, dtype=jnp.int32))
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        if tree is not None:
            words, first_new = tree
            query = position[:, :, None] - first_new
            visible &= tree_allows(
                [words[:, :, None, w] for w in range(words.shape[-1])], query - distance, query
            )
        visible = visible[:, None]
        new_top = jnp.maximum(top, jnp.max(jnp.where(visible, logits, NEGATIVE), axis=-1))
        weights = jnp.where(visible, jnp.exp(logits - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        values = keys if kv.shape[1] == 1 else fetch(ids, 1)
        values = jnp.einsum("nkms,nksd->nkmd", weights, values, precision="highest")
        return new_top, total, acc * shrink[..., None] + values

    shape = (num_rows, num_kv_heads, num_queries)
    top, total = jnp.full(shape, NEGATIVE, jnp.float32), jnp.zeros(shape, jnp.float32)
    if sinks is not None:
        top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)
    first = 0
    if window is not None:
        lowest = jnp.min(jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max))
        first = jnp.maximum(lowest - window + 1, 0) // block
    stop = jnp.max(position) // block + 1
    _, total, acc = lax.fori_loop(first, stop, step, (top, total, jnp.zeros_like(q)))
    return acc / jnp.where(total == 0.0, 1.0, total)[..., None]
