"""Block sizes of the TPU kernel, and the list of pairs of blocks that it passes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from pallas_kernels.flash_attention.spec import AttentionSpec

FIRST, LAST, MASKED = 1, 2, 4  # of a tile of queries; not every query of the pair sees every key
_BITS = 14  # of a block's index: sequences of two million tokens and more
LANES = 128


@dataclass(frozen=True)
class Blocks:
    """Static sizes, multiples of 128: query tokens per tile, keys per block, and the tile's rows per unit of work."""

    queries: int
    keys: int
    unit: int


def choose_blocks(spec: AttentionSpec) -> Blocks:
    """Large blocks keep the matrix units busy; on a short sequence or a narrow window they pass too much masked work.

    By the compiler's own schedules on v6e at Llama-3-8B's heads, cycles for 128 queries of all heads and 512 keys: tiles of
    256 x 512 take 9,700, 512 x 512 5,800, 512 x 1024 5,300. Of 8,192 causal tokens the last two pass 6% and 12% too
    much.
    """
    reach = min(spec.length, spec.window or spec.length)
    keys = 1024 if reach >= 8192 and spec.dtype != np.float32 else 512
    queries = max(2048 // spec.groups // LANES * LANES, LANES)
    if spec.window is not None:
        queries = min(queries, max(_rounded_up(spec.window), 2 * LANES))
    queries, keys = (min(size, _rounded_up(spec.length)) for size in (min(queries, 1024), keys))
    return Blocks(queries, keys, unit=2 * LANES if queries % (2 * LANES) == 0 else LANES)


def _rounded_up(size: int) -> int:
    return -(-size // LANES) * LANES


@functools.cache
def pair_list(spec: AttentionSpec, blocks: Blocks) -> np.ndarray:
    """int32[pairs]: see `unpack`. Tiles in order, and within each its blocks of keys in order."""
    tiles = -(-spec.length // blocks.queries)
    tile = np.arange(tiles, dtype=np.int64)[:, None]
    block = np.arange(-(-spec.length // blocks.keys), dtype=np.int64)[None]
    top, bottom = tile * blocks.queries, np.minimum((tile + 1) * blocks.queries, spec.length) - 1
    left, right = block * blocks.keys, (block + 1) * blocks.keys - 1
    wanted = np.broadcast_to(left < spec.length, (tiles, block.size)).copy()
    whole = np.broadcast_to(right < spec.length, wanted.shape).copy()
    if spec.causal:
        wanted &= left <= bottom
        whole &= right <= top
    if spec.window is not None:
        wanted &= top - right < spec.window
        whole &= bottom - left < spec.window
        if not spec.causal:
            wanted &= left - bottom < spec.window
            whole &= right - top < spec.window
    at_tile, at_block = np.nonzero(wanted)
    change = np.flatnonzero(np.diff(at_tile)) + 1
    flags = np.where(whole[at_tile, at_block], 0, MASKED)
    flags[np.concatenate([[0], change])] |= FIRST
    flags[np.concatenate([change - 1, [-1]])] |= LAST
    return ((at_tile << (_BITS + 3)) | (at_block << 3) | flags).astype(np.int32)


def unpack(pair):
    """(tile of queries, block of keys, flags) of an entry, an int or a traced int32."""
    return pair >> (_BITS + 3), (pair >> 3) & ((1 << _BITS) - 1), pair & 7
