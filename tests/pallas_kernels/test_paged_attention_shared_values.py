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
