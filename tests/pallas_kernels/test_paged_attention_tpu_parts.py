"""What surrounds the TPU kernels: which pools they serve, how the pool is laid out, how blocks are chosen."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import ImplementationError, dispatch
from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import tpu_blocks
from pallas_kernels.paged_attention.tpu_pages import TpuPool, joined, lanes_of
from tests.support.ragged import plain_pool, tpu_pool

LLAMA = tpu_blocks.Shape(32, 8, 128, 32, "bfloat16", 64)
LATENT = tpu_blocks.Shape(4, 1, 576, 32, "bfloat16", 64, shared_values=True)
MIB = 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (16, 8, 2, 64, "bfloat16"),
            "page_size is 8: with pages of bfloat16 the TPU kernels take multiples of 16",
        ),
        ((16, 16, 2, 64, "int8"), "page_size is 16: with pages of int8 the TPU kernels take multiples of 32"),
        (
            (16, 32, 2, 320, "float32"),
            "head_dim is 320: of keys and values that are kept apart the TPU kernels take up to 256",
        ),
    ],
)
def test_a_named_kernel_says_why_it_cannot_serve(arguments, message):
    with pytest.raises(ImplementationError, match=message):
        pa.kv_shape(*arguments, implementation="tpu")


def test_latents_are_served_up_to_a_size():
    for head_dim in (32, 36, 576, 1024):
        pool = pa.kv_shape(16, 32, 1, head_dim, "bfloat16", shared_values=True, implementation="tpu")
        assert pool.pages.shape == (16, 1, 1, 32, -(-head_dim // 128) * 128)
        assert (pool.head_dim, pool.shared_values) == (head_dim, True)
    with pytest.raises(ImplementationError, match="head_dim is 1025: of shared keys and values"):
        pa.kv_shape(16, 32, 1, 1025, "bfloat16", shared_values=True, implementation="tpu")
    with pytest.raises(ImplementationError, match="page_size is 8"):
        pa.kv_shape(16, 8, 1, 576, "bfloat16", shared_values=True, implementation="tpu")


def test_the_engine_on_tpu_takes_it_by_itself(monkeypatch):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    shape = pa.kv_shape(16, 32, 8, 128, "bfloat16")
    assert isinstance(shape, TpuPool)
    assert pa.kv_partition_spec("tensor", kv=shape).pages == P(None, None, "tensor", None, None)
    latents = pa.kv_shape(16, 32, 1, 576, "bfloat16", shared_values=True)
    assert isinstance(latents, TpuPool)
    assert pa.kv_partition_spec("tensor", kv=latents) == TpuPool(
        P(None, None, "tensor", None, None), 576, shared_values=True
    )
    # What the kernels do not serve falls to the XLA path.
    assert isinstance(pa.kv_shape(16, 8, 8, 128, "bfloat16"), jax.ShapeDtypeStruct)


@pytest.mark.parametrize(
    ("head_dim", "shape"),
    [
        (64, (16, 1, 2, 32, 128)),  # keys and values side by side: nothing is wasted
        (40, (16, 1, 2, 32, 128)),
        (80, (16, 2, 2, 32, 128)),
        (128, (16, 2, 2, 32, 128)),
        (256, (16, 2, 2, 32, 256)),
    ],
)
def test_the_pools_shape(head_dim, shape):
    pool = pa.kv_shape(16, 32, 2, head_dim, "bfloat16", implementation="tpu")
    assert pool.pages.shape == shape
    assert pool.head_dim == head_dim


@pytest.mark.parametrize("head_dim", [36, 64, 576])
def test_new_rows_of_shared_values_are_kept_once(head_dim):
    k = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, head_dim), dtype=np.float32))
    lanes = lanes_of(head_dim, shared_values=True)[1]
    rows = joined(k, k, shared_values=True).reshape(3, 1, 2, 1, lanes)
    plain = plain_pool(TpuPool(rows, head_dim, shared_values=True))
    np.testing.assert_array_equal(plain[:, 0, :, 0], k)
    np.testing.assert_array_equal(tpu_pool(jnp.asarray(plain)).pages, rows)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 256])
def test_new_rows_are_laid_out_as_the_pool_is(head_dim):
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, 3, 2, head_dim), dtype=np.float32)
    slabs, lanes = lanes_of(head_dim)
    rows = joined(jnp.asarray(k), jnp.asarray(v)).reshape(3, slabs, 2, 1, lanes)
    plain = plain_pool(TpuPool(rows, head_dim))
    np.testing.assert_array_equal(plain[:, 0, :, 0], k)
    np.testing.assert_array_equal(plain[:, 1, :, 0], v)
    np.testing.assert_array_equal(tpu_pool(jnp.asarray(plain)).pages, rows)


def bytes_of_pages(shape: tpu_blocks.Shape, pages: int) -> int:
    slabs, lanes = lanes_of(shape.head_dim, shape.shared_values)
    return pages * slabs * shape.num_kv_heads * shape.page_size * lanes * jnp.dtype(shape.dtype).itemsize


@pytest.mark.parametrize(
    "shape",
    [
        LLAMA,
        replace(LLAMA, num_heads=8, num_kv_heads=1),
        replace(LLAMA, num_heads=32, num_kv_heads=32, head_dim=96),
        replace(LLAMA, num_heads=16, num_kv_heads=8, head_dim=256),
        replace(LLAMA, num_heads=28, num_kv_heads=4, page_size=128),
        replace(LLAMA, dtype="int8"),
        replace(LLAMA, dtype="float32", num_kv_heads=32, page_size=128),
        replace(LLAMA, row_pages=2),
        LATENT,
        replace(LATENT, num_heads=32),
        replace(LATENT, num_heads=128, page_size=128),
        replace(LATENT, num_heads=16, dtype="float32", head_dim=1024),
    ],
)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("vmem", [64 * MIB, 128 * MIB])
def test_chosen_blocks_fit(shape, window, vmem):
    blocks = tpu_blocks.heuristic(shape, window, vmem)
    lanes = lanes_of(shape.head_dim)[1]
    token = shape.num_heads * 4 * (5 * lanes + 2 * lanes + 2 * 128)
    taken = blocks.chunk_tile * token + bytes_of_pages(shape, blocks.chunk_pages * blocks.chunk_buffers)
    assert taken < blocks.vmem_bytes < vmem
    assert bytes_of_pages(shape, blocks.decode_pages * blocks.decode_buffers) < blocks.vmem_bytes
    assert blocks.decode_pages % blocks.decode_part_pages == 0
    assert blocks.decode_pages <= max(1, shape.row_pages)
    assert blocks.chunk_tile % blocks.chunk_small_tile == 0
    if window:  # no more is fetched than a window can touch, rounded up to pages
        assert blocks.decode_pages * shape.page_size <= window + 2 * shape.page_size


def test_blocks_of_llama():
    blocks = tpu_blocks.heuristic(LLAMA, None, 128 * MIB)
    assert (blocks.decode_pages, blocks.chunk_tile, blocks.chunk_pages) == (32, 128, 16)


def test_two_cores_of_a_device_take_half_of_the_heads_each():
    half = replace(LLAMA, num_heads=16, num_kv_heads=4)
    assert tpu_blocks.heuristic(LLAMA, None, 64 * MIB, 2) == replace(
        tpu_blocks.heuristic(half, None, 64 * MIB), cores=2
    )
    assert tpu_blocks.heuristic(replace(LLAMA, num_kv_heads=3, num_heads=6), None, 64 * MIB, 2).cores == 1


def test_two_cores_of_a_device_take_half_of_a_single_heads_queries_each():
    assert tpu_blocks.heuristic(LATENT, None, 64 * MIB, 2) == replace(
        tpu_blocks.heuristic(replace(LATENT, num_heads=2), None, 64 * MIB), cores=2
    )
    assert tpu_blocks.heuristic(replace(LATENT, num_heads=5), None, 64 * MIB, 2).cores == 1


def test_a_devices_table_overrides_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_blocks, "TABLES", tmp_path)
    monkeypatch.setattr(tpu_blocks, "device_name", lambda: "v6e")
    entries = [
        {"num_heads": 8, "blocks": {"decode_pages": 4}},
        {"dtype": "bfloat16", "head_dim": 128, "blocks": {"decode_pages": 16, "chunk_tile": 32}},
    ]
    (tmp_path / "v6e.json").write_text(json.dumps(entries))
    plain = tpu_blocks.heuristic(LLAMA, None, *tpu_blocks.device())
    assert tpu_blocks.choose(LLAMA, None) == replace(plain, decode_pages=16, chunk_tile=32)
    assert tpu_blocks.choose(replace(LLAMA, num_heads=8), None).decode_pages == 4
    other = replace(LLAMA, dtype="int8")
    assert tpu_blocks.choose(other, None) == tpu_blocks.heuristic(other, None, *tpu_blocks.device())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"heads": 8, "blocks": {}}, r"unknown names \['heads'\]"),
        ({"num_heads": 8, "blocks": {"decode_page": 4}}, r"unknown names \['decode_page'\]"),
        ({"num_heads": 8}, "it must have 'blocks'"),
        ({"num_heads": 8, "blocks": {"decode_pages": 0}}, "not an integer of at least 1"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, entry, message):
    (tmp_path / "wrong.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=message):
        tpu_blocks.overrides(tmp_path / "wrong.json", LLAMA)
