"""Pools that keep one array per token, its key and its value: as pools that keep it twice, in half the bytes."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ImplementationError
from pallas_kernels import paged_attention as pa
from tests.support.ragged import Row, Shape, make_step

DECODES, CHUNKS = [Row(1, 30), Row(1, 9), Row(1, 64), Row(1, 1)], [Row(17, 40), Row(5, 5)]
MIXED = Shape(kv_heads=1, heads=6)
STEPS = {
    "mixed": make_step(MIXED, DECODES[:3], CHUNKS, seed=3),
    "decode": make_step(replace(MIXED, num_tokens=MIXED.num_rows), DECODES, seed=4),
}


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
@pytest.mark.parametrize("kind", STEPS)
def test_values_that_are_the_keys_are_kept_once(implementation, kind):
    step = STEPS[kind]
    twice = step.kv.at[:, 1].set(step.kv[:, 0])
    results = []
    for kv in (twice, twice[:, :1]):
        kv = pa.write_kv(kv, step.k, step.k, step.batch, page_offset=7, implementation=implementation)
        y = pa.attend(step.q, kv, step.batch, page_offset=7, scale=0.3, implementation=implementation)
        results.append((kv, y))
    (kept_twice, expected), (kept_once, actual) = results
    live = int(step.batch.num_tokens)
    np.testing.assert_allclose(actual[:live], expected[:live], rtol=1e-6, atol=1e-6)
    assert kept_once.shape[1] == 1
    np.testing.assert_array_equal(kept_once, kept_twice[:, :1])


@pytest.mark.parametrize("implementation", ["reference", "xla", "cpu"])
def test_a_value_may_be_the_first_numbers_of_a_key(implementation):
    step = STEPS["mixed"]
    kv = pa.write_kv(step.kv[:, :1], step.k, step.k, step.batch, page_offset=0, implementation=implementation)
    options = {"page_offset": 0, "scale": 0.3, "implementation": implementation}
    whole = pa.attend(step.q, kv, step.batch, **options)
    narrow = pa.attend(step.q, kv, step.batch, **options, value_dim=10)
    np.testing.assert_array_equal(narrow, whole[:, :, :10])


@pytest.mark.parametrize(("halves", "value_dim"), [(1, 0), (1, 17), (2, 10)])
def test_a_width_that_no_value_has_is_refused(halves, value_dim):
    step = STEPS["mixed"]
    with pytest.raises(ValueError, match=f"value_dim is {value_dim}: it must be None, or from 1 to"):
        pa.attend(
            step.q,
            step.kv[:, :halves],
            step.batch,
            page_offset=0,
            scale=0.3,
            value_dim=value_dim,
            implementation="reference",
        )


def test_the_pool_has_half_the_bytes():
    sizes = [
        math.prod(pa.kv_shape(4, 8, 1, 576, jnp.bfloat16, shared_values=shared, implementation="xla").shape)
        for shared in (False, True)
    ]
    assert sizes == [4 * 8 * 576 * 2, 4 * 8 * 576]


def test_implementations_that_keep_them_apart_say_so():
    with pytest.raises(ImplementationError, match="keeps keys and values apart"):
        pa.kv_shape(4, 32, 1, 128, jnp.bfloat16, shared_values=True, implementation="gpu")
    # Automatic choice takes one that can.
    pool = pa.kv_shape(4, 8, 1, 16, jnp.float32, shared_values=True)
    assert isinstance(pool, jax.ShapeDtypeStruct)
