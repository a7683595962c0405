"""Block sizes of the TPU kernels: from the shapes and the device's VMEM, or from a table made for the device.

A table is a JSON file in `tpu_tables/`, named as `device_name()` says, with a list of entries such as

    {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 32, "dtype": "bfloat16",
     "blocks": {"decode_pages": 32, "chunk_tile": 128}}

where `blocks` names what the heuristic should not decide. An entry applies where all that it says of the shape is so;
the first that does is taken.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.tpu_pages import LANES, lanes_of

TABLES = Path(__file__).parent / "tpu_tables"
MIB = 1024 * 1024
SMALLEST_VMEM = 64 * MIB  # of the supported generations, for a device that is not known


@dataclass(frozen=True)
class Shape:
    """One device's share of an attention layer. row_pages: pages per row in the table."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    row_pages: int
    shared_values: bool = False


@dataclass(frozen=True)
class Blocks:
    """See `DecodeConfig` and `ChunkConfig`. vmem_bytes: what a kernel may take."""

    decode_pages: int
    decode_buffers: int
    decode_part_pages: int
    chunk_tile: int
    chunk_small_tile: int
    chunk_pages: int
    chunk_buffers: int
    cores: int
    vmem_bytes: int


def device_name() -> str:
    """Such as "v6e": the TPU that is being compiled for; "unknown" elsewhere, as in interpret mode."""
    try:
        return str(pltpu.get_tpu_info().chip_version)
    except ValueError:
        return "unknown"


def device() -> tuple[int, int]:
    """(VMEM bytes of a core, cores per device) of the TPU that is being compiled for."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return SMALLEST_VMEM, 1
    return info.vmem_capacity_bytes, info.num_cores


def choose(shape: Shape, window: int | None) -> Blocks:
    """The heuristic's choice, with what the device's table says of the shape instead."""
    blocks = heuristic(shape, window, *device())
    return replace(blocks, **overrides(TABLES / f"{device_name()}.json", shape))


def heuristic(shape: Shape, window: int | None, vmem: int, cores: int = 1) -> Blocks:
    """Blocks large enough that starting and ending one is little beside it, within half of the VMEM.

    Decode: at most 1,024 tokens or 4 MiB a block, three in flight: one attended, one arriving, one asked for. Chunks:
    512 query rows per KV head against 512 tokens; both matrix products are then large, and the softmax's state is
    touched once per 512 columns.
    """
    # Two cores that are one device take half of the KV heads each; of a single one, half of its query heads.
    divides = shape.num_kv_heads % cores == 0 or (shape.num_kv_heads == 1 and shape.num_heads % cores == 0)
    cores = cores if divides else 1
    num_kv_heads = max(shape.num_kv_heads // cores, 1)
    shape = replace(shape, num_heads=shape.num_heads // cores, num_kv_heads=num_kv_heads)
    num_slabs, lanes = lanes_of(shape.head_dim, shape.shared_values)
    item = jnp.dtype(shape.dtype).itemsize
    page_bytes = num_slabs * shape.num_kv_heads * shape.page_size * lanes * item
    longest = shape.row_pages * shape.page_size

    def pages(tokens: int, budget: int) -> int:
        tokens = min(tokens, longest, window + shape.page_size if window else longest)
        return max(1, min(-(-tokens // shape.page_size), budget // page_bytes))

    decode_pages = pages(1024 if shape.num_kv_heads > 2 else 2048, 4 * MIB)
    part = max(1, 256 // shape.page_size)
    part = max(n for n in range(1, part + 1) if decode_pages % n == 0)
    group = shape.num_heads // shape.num_kv_heads
    tile = 8
    # Per token and head: queries and results twice and thrice in float32, the stack, and the softmax's state.
    token_bytes = shape.num_heads * (5 * 4 * lanes + 4 * lanes + 4 * lanes + 2 * 4 * LANES)
    while tile < 256 and 2 * tile * group <= 512 and 2 * tile * token_bytes <= vmem // 3:
        tile *= 2
    return Blocks(
        decode_pages=decode_pages,
        decode_buffers=3,
        decode_part_pages=part,
        chunk_tile=tile,
        chunk_small_tile=8,
        chunk_pages=pages(512, 2 * MIB),
        chunk_buffers=3,
        cores=cores,
        vmem_bytes=vmem * 3 // 4,
    )


def overrides(table: Path, shape: Shape) -> dict[str, int]:
    """What a device's table says of a shape; nothing where there is no table or no entry.

    Raises:
      ValueError: an entry names a property of the shape or a block size that there is not, or a size below 1.
    """
    described = asdict(shape)
    for entry in _read(table):
        if all(described[name] == value for name, value in entry.items() if name != "blocks"):
            return entry["blocks"]
    return {}


@functools.cache
def _read(table: Path) -> tuple[dict[str, Any], ...]:
    if not table.is_file():
        return ()
    entries = json.loads(table.read_text())
    shape_names, block_names = ({field.name for field in fields(kind)} for kind in (Shape, Blocks))
    for entry in entries:
        unknown = (entry.keys() - shape_names - {"blocks"}) | (entry.get("blocks", {}).keys() - block_names)
        if unknown or "blocks" not in entry:
            raise ValueError(
                f"{table}: entry {entry} has unknown names {sorted(unknown)}: it must have 'blocks', and beside it "
                f"only {sorted(shape_names)}; in 'blocks' only {sorted(block_names)}"
            )
        if any(not isinstance(size, int) or size < 1 for size in entry["blocks"].values()):
            raise ValueError(f"{table}: entry {entry} has a block size that is not an integer of at least 1")
    return tuple(entries)
