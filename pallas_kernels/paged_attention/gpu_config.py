"""Sizes of the GPU kernels: a heuristic on shared memory and shapes, and a table per device that overrides it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pallas_kernels.gpu_parts import SMEM_BYTES, measured, num_blocks_at_once
from pallas_kernels.gpu_tiles import TileConfig, tile_config


@dataclass(frozen=True)
class DecodeConfig:
    """Of the decode kernel.

    Attributes:
      kv_tokens: KV tokens per block, 64 or 128.
      stages: blocks in flight, even.
      num_blocks: persistent blocks, one per streaming multiprocessor.
      consumer_registers, producer_registers: per thread, multiples of 8.
    """

    kv_tokens: int
    stages: int
    num_blocks: int
    consumer_registers: int = 232
    producer_registers: int = 40


def decode_config(page_size: int, head_dim: int) -> DecodeConfig:
    kv_tokens = 64
    block = 2 * kv_tokens * head_dim * 2
    fixed = 2 * 64 * head_dim * 2 + 2 * 64 * 64 * 4 + 8192
    stages = min(8, (SMEM_BYTES - fixed) // block // 2 * 2)
    config = DecodeConfig(kv_tokens, stages, num_blocks_at_once())
    return replace(config, **measured("decode", head_dim))


def prompt_config(page_size: int, head_dim: int) -> TileConfig:
    return tile_config(head_dim)
