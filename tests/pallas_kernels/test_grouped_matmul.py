"""The grouped matmul against its reference, on ragged groups, in every implementation that runs or interprets here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ImplementationError
from pallas_kernels.grouped_matmul import grouped_matmul, loop, tpu
from pallas_kernels.tpu_layout import last_in_lanes

# (rows, sizes of the groups): rows past the last group are padding.
RAGGED = {
    "every_group_has_rows": (24, [3, 9, 5, 7]),
    "empty_groups": (24, [0, 10, 0, 0, 14, 0]),
    "padding_behind": (40, [5, 0, 8, 2]),
    "one_row": (1, [0, 1, 0]),
    "no_row": (8, [0, 0, 0]),
    "one_group_has_all": (70, [0, 70, 0, 0]),
    "many_small_groups": (33, [1] * 30 + [0, 2]),
    "groups_longer_than_a_tile": (300, [130, 1, 0, 169]),
}


def arrays(rows, sizes, num_out, num_in, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(rows, num_in)), dtype)
    w = jnp.asarray(random.normal(size=(len(sizes), num_out, num_in)) / num_in**0.5, dtype)
    return x, w, jnp.asarray(sizes, jnp.int32)


def by_hand(x, w, sizes):
    """float64, row by row."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack(
        [np.asarray(w, np.float64)[g] @ np.asarray(x, np.float64)[i] for i, g in enumerate(groups)]
    )


def check(x, w, sizes, implementation, tolerance=1e-5):
    live = int(sizes.sum())
    actual = grouped_matmul(x, w, sizes, implementation=implementation)
    assert actual.shape == (x.shape[0], w.shape[1])
    assert actual.dtype == x.dtype
    if live:
        expected = by_hand(x, w, np.asarray(sizes))
        np.testing.assert_allclose(np.asarray(actual[:live], np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "xla", "loop"])
@pytest.mark.parametrize("case", RAGGED)
def test_every_row_is_multiplied_by_its_own_groups_weight(case, implementation):
    rows, sizes = RAGGED[case]
    check(*arrays(rows, sizes, 20, 13), implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla", "loop"])
def test_bfloat16_is_summed_in_float32(implementation):
    check(*arrays(24, [3, 9, 5, 7], 16, 512, jnp.bfloat16), implementation, 0.03)


def test_group_sizes_are_run_time_values():
    """One program serves every way that rows fall to groups."""
    x, w, _ = arrays(24, [6, 6, 6, 6], 20, 13)
    call = jax.jit(functools.partial(grouped_matmul, implementation="loop"))
    for sizes in ([24, 0, 0, 0], [0, 0, 0, 24], [1, 22, 1, 0], [6, 6, 6, 6]):
        np.testing.assert_allclose(call(x, w, jnp.asarray(sizes, jnp.int32)), by_hand(x, w, sizes), atol=1e-5)
    assert call._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("implementation", ["reference", "xla", "loop"])
def test_a_layer_of_a_stack(implementation):
    x, w, sizes = arrays(24, [3, 9, 5, 7], 20, 13)
    stack = jnp.stack([w + 1, w, w - 1])
    expected = grouped_matmul(x, w, sizes, implementation=implementation)
    actual = jax.jit(lambda i: grouped_matmul(x, stack, sizes, layer=i, implementation=implementation))(1)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_the_loops_tiles():
    assert loop.tile_rows(1, 32) == 1
    assert loop.tile_rows(16, 32) == 8
    assert loop.tile_rows(2048, 128) == 16
    assert loop.tile_rows(65536, 8) == 64


@pytest.fixture
def interpreted():
    """Pallas TPU kernels run on the CPU, and a race between their copies and their loads fails the test."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        yield
        assert interpreter.races is None or not interpreter.races.races_found


@pytest.mark.parametrize("case", [name for name in RAGGED if name != "no_row"])
def test_the_tpu_kernel(interpreted, monkeypatch, case):
    # Small limits, so that several blocks of outputs and several tiles of rows are visited.
    monkeypatch.setattr(tpu, "WEIGHT_BYTES", 128 * 128 * 4)
    monkeypatch.setattr(tpu, "ROWS_BYTES", 32 * 128 * 4)
    jax.clear_caches()
    rows, sizes = RAGGED[case]
    check(*arrays(rows, sizes, 256, 128), "tpu")


def test_the_tpu_kernel_in_bfloat16(interpreted):
    check(*arrays(60, [3, 29, 0, 17], 128, 256, jnp.bfloat16), "tpu", 0.03)


def test_the_tpu_kernel_reads_a_layer_of_a_stack(interpreted):
    x, w, sizes = arrays(24, [3, 9, 5, 7], 128, 128)
    actual = grouped_matmul(x, jnp.stack([w + 1, w, w - 1]), sizes, layer=1, implementation="tpu")
    np.testing.assert_allclose(actual, by_hand(x, w, sizes), atol=1e-5)


def test_the_tpu_kernel_takes_weights_in_the_order_that_xla_keeps_them_in(interpreted):
    assert last_in_lanes(2880, 2880, 2)
    assert not last_in_lanes(2880, 720, 2)
    assert not last_in_lanes(256, 144, 4)
    check(*arrays(60, [3, 29, 0, 17], 256, 144), "tpu")


def test_the_tpu_kernels_last_block_of_outputs_may_be_partly_filled(interpreted, monkeypatch):
    monkeypatch.setattr(tpu, "WEIGHT_BYTES", 144 * 128 * 4)
    jax.clear_caches()
    check(*arrays(60, [3, 29, 0, 17], 176, 144), "tpu")


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("case", RAGGED)
def test_the_work_list_visits_every_tile_of_every_group_once(case, tile):
    rows, sizes = RAGGED[case]
    _, groups, tiles, count = tpu.work_list(jnp.asarray(sizes, jnp.int32), rows, tile)
    visited = list(zip(groups.tolist(), tiles.tolist(), strict=True))[: int(count)]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    assert visited == sorted({(int(g), i // tile) for i, g in enumerate(owner)})


def test_the_tpu_kernel_says_what_it_cannot_serve():
    with pytest.raises(ImplementationError, match="multiples of 16"):
        grouped_matmul(*arrays(24, [3, 9, 5, 7], 20, 13), implementation="tpu")
    with pytest.raises(ImplementationError, match="too long"):
        x, w = (
            jax.ShapeDtypeStruct((8, 2**15), jnp.float32),
            jax.ShapeDtypeStruct((2, 128, 2**15), jnp.float32),
        )
        sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
        jax.eval_shape(functools.partial(grouped_matmul, implementation="tpu"), x, w, sizes)


def test_arguments_outside_the_contract():
    x, w, sizes = arrays(24, [3, 9, 5, 7], 20, 13)
    with pytest.raises(ValueError, match=r"must be \[M, K\] and \[G, N, K\]"):
        grouped_matmul(x, w[:, :, 1:], sizes)
    with pytest.raises(ValueError, match=r"must be \[M, K\] and \[L, G, N, K\]"):
        grouped_matmul(x, w, sizes, layer=0)
    with pytest.raises(ValueError, match=r"must be int32\[4\]"):
        grouped_matmul(x, w, sizes[1:])
    with pytest.raises(ValueError, match="must be the same"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
