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
    """Static sizes: query tokens per tile, keys per block, and the VMEM that the kernel may take."""

    queries: int
    keys: int
    vmem_bytes: int


def choose_blocks(spec: AttentionSpec) -> Blocks:
    queries, keys = 256, 512
    return Blocks(queries, keys, 64 * 1024 * 1024)


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
