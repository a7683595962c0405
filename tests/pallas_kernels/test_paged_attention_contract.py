"""What is outside the contract is refused before anything is built, by name and with what is allowed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import ImplementationError
from pallas_kernels import paged_attention as pa
from tests.support.ragged import Row, Shape, make_step


@pytest.fixture(scope="module")
def step():
    return make_step(Shape(), [Row(1, 9)], [Row(5, 20)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 4, 2, 64, "float32"), "page_size is 4: it must be an integer from 8 to 128"),
        ((16, 256, 2, 64, "float32"), "page_size is 256"),
        ((16, 16.0, 2, 64, "float32"), "page_size is 16.0"),
        ((0, 16, 2, 64, "float32"), "num_pages is 0"),
        ((16, 16, 0, 64, "float32"), "num_kv_heads is 0"),
        ((16, 16, 2, -1, "float32"), "head_dim is -1"),
        (
            (16, 16, 2, 64, "int16"),
            r"dtype has dtype int16: it must be one of \['float32', 'bfloat16', 'float16', 'int8', 'float8_e4m3fn'\]",
        ),
        ((16, 16, 2, 64, "int4"), "dtype has dtype int4"),
    ],
)
def test_kv_shape_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pa.kv_shape(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((47, 6, 16))}, r"q has shape \(47, 6, 16\).*\(48, heads, 16\)"),
        ({"q": jnp.zeros((48, 6, 8))}, "q has shape"),
        ({"q": jnp.zeros((48, 96))}, "q has shape"),
        ({"q": jnp.zeros((48, 5, 16))}, "q has 5 heads: it must be a multiple of the pool's 2 KV heads"),
        ({"q": jnp.zeros((48, 6, 16), jnp.int16)}, "q has dtype int16"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0"),
        ({"sinks": jnp.zeros(2)}, r"sinks has shape \(2,\): it must be \(6,\)"),
        ({"kv": jnp.zeros((4, 8, 16))}, "kv does not have its layout"),
        ({"v_scale": 0.5}, "v_scale is given and the pool keeps float32: leave it out"),
    ],
)
def test_attend_refuses(step, changes, message):
    plan = pa.prepare(step.batch, step.kv, 48)
    arguments = {"q": step.q, "kv": step.kv, "batch": plan, "page_offset": 0, "scale": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        pa.attend(**arguments)


def test_write_kv_refuses(step):
    with pytest.raises(ValueError, match=r"v has shape \(48, 3, 16\): .* it must be \(48, 2, 16\)"):
        pa.write_kv(step.kv, step.k, jnp.zeros((48, 3, 16)), step.batch, page_offset=0)
    with pytest.raises(ValueError, match="k has dtype int32"):
        pa.write_kv(step.kv, step.k.astype(jnp.int32), step.v, step.batch, page_offset=0)


@pytest.mark.parametrize(
    ("changes", "num_tokens", "message"),
    [
        (
            {"query_starts": jnp.zeros(6, jnp.int32)},
            48,
            r"query_starts has shape \(6,\): with 6 rows it must be \(7,\)",
        ),
        ({"page_table": jnp.zeros((5, 3), jnp.int32)}, 48, "page_table has shape"),
        ({"context_lens": jnp.zeros(6)}, 48, "context_lens has dtype float32: it must be int32"),
        ({"decode_only": True}, 48, "decode_only is True with 48 tokens and 6 rows"),
        ({"tree_mask": jnp.zeros((47, 1), jnp.int32)}, 48, r"tree_mask has shape \(47, 1\).*\(48, words\)"),
        ({"tree_mask": jnp.zeros((48, 1))}, 48, "tree_mask has dtype float32: it must be int32"),
    ],
)
def test_prepare_refuses(step, changes, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        pa.prepare(replace(step.batch, **changes), step.kv, num_tokens)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "k_scale is missing: a pool of int8 needs this layer's scale"),
        ({"k_scale": 0.1}, "v_scale is missing"),
        (
            {"k_scale": 0.1, "v_scale": jnp.ones(3)},
            r"v_scale has shape \(3,\): it must be a number or \(2,\)",
        ),
    ],
)
def test_a_quantized_pool_needs_its_scales(scales, message):
    step = make_step(Shape(kv_dtype="int8"), [Row(1, 9)])
    plan = pa.prepare(step.batch, step.kv, 48, implementation="xla")
    with pytest.raises(ValueError, match=message):
        pa.write_kv(step.kv, step.k, step.v, plan, page_offset=0, **scales)
    with pytest.raises(ValueError, match=message):
        pa.attend(step.q, step.kv, plan, page_offset=0, scale=1.0, **scales)


def test_a_plan_belongs_to_one_implementation(step):
    plan = pa.prepare(step.batch, step.kv, 48, implementation="reference")
    with pytest.raises(
        ImplementationError, match="implementation is 'xla' and the plan was prepared for 'reference'"
    ):
        pa.attend(step.q, step.kv, plan, page_offset=0, scale=1.0, implementation="xla")


def test_a_plan_and_its_batch_mean_the_same(step):
    plan = pa.prepare(step.batch, step.kv, 48)

    def run(batch):
        kv = pa.write_kv(step.kv, step.k, step.v, batch, page_offset=0)
        return pa.attend(step.q, kv, batch, page_offset=0, scale=1.0)

    assert jnp.array_equal(jax.jit(run)(plan)[:6], jax.jit(run)(step.batch)[:6])
    assert jnp.array_equal(jax.jit(run)(plan)[:6], run(step.batch)[:6])


def test_positions_rows_and_slots_of_tokens():
    batch = make_step(Shape(), [Row(1, 9), Row(1, 1)], [Row(3, 17), Row(0, 5), Row(2, 2)]).batch
    table = batch.page_table
    assert batch.token_positions(48)[:8].tolist() == [8, 0, 14, 15, 16, 0, 1, 0]
    assert batch.token_rows(48)[:7].tolist() == [0, 1, 2, 2, 2, 4, 4]
    page, slot = batch.token_slots(48, 8)
    assert slot[:7].tolist() == [0, 0, 6, 7, 0, 0, 1]
    assert page[:7].tolist() == [
        table[r, p].item() for r, p in [(0, 1), (1, 0), (2, 1), (2, 1), (2, 2), (4, 0), (4, 0)]
    ]
    assert page[7:].tolist() == [0] * 41
