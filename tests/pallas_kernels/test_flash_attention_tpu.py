"""The TPU kernel of dense attention in interpret mode with race detection, and the list of blocks that it passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import flash_attention as fa
from pallas_kernels.dispatch import ImplementationError
from pallas_kernels.flash_attention import tpu
from pallas_kernels.flash_attention.tpu_plan import (
    FIRST,
    LAST,
    MASKED,
    Blocks,
    choose_blocks,
    pair_list,
    unpack,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of several units in few tokens."""
    monkeypatch.setattr(tpu, "choose_blocks", lambda spec: Blocks(queries=256, keys=128, unit=128))
    jax.clear_caches()
    yield
    jax.clear_caches()


# batch, length, heads, KV heads, head size, dtype; then the live lengths and the options
CASES = {
    "causal": ((1, 500, 2, 1, 128, "float32"), [500], {}),
    "ragged": ((3, 300, 2, 2, 64, "float32"), [300, 0, 129], {}),
    "short": ((2, 9, 2, 1, 64, "float32"), [9, 1], {}),
    "window": ((1, 520, 2, 1, 128, "float32"), [511], {"sliding_window": 130}),
    "both ways": ((2, 300, 2, 1, 96, "float32"), [300, 200], {"causal": False}),
    "window both ways": ((1, 520, 1, 1, 128, "float32"), [500], {"causal": False, "sliding_window": 100}),
    "soft cap and sinks": ((1, 300, 3, 1, 80, "float32"), [300], {"soft_cap": 2.0, "sinks": True}),
    "bf16": ((1, 300, 4, 2, 128, "bfloat16"), [290], {"sliding_window": 200, "soft_cap": 30.0, "sinks": True}),
    "head size 256": ((1, 260, 2, 1, 256, "bfloat16"), [260], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_reference_without_races(small_blocks, name):
    (batch, length, heads, kv_heads, head_dim, dtype), lengths, options = CASES[name]
    random = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(random.standard_normal((batch, length, h, head_dim)), dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    lengths = jnp.asarray(lengths, jnp.int32)
    live = np.arange(length) < np.asarray(lengths)[:, None]
    # Whatever stands behind a sequence must not reach it.
    v = jnp.where(live[:, :, None, None], v, jnp.asarray(jnp.nan, v.dtype))
    options = {**options, "scale": head_dim**-0.5, "lengths": lengths}
    if options.pop("sinks", False):
        options["sinks"] = jnp.linspace(-1.0, 2.0, heads, dtype=jnp.float32)
    wanted = fa.attend(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="reference", **options)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")):
        got = jax.block_until_ready(fa.attend(q, k, v, implementation="tpu", **options))
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found
    assert got.dtype == q.dtype
    assert np.isfinite(np.asarray(got, np.float32)).all()
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        np.asarray(got, np.float32)[live], np.asarray(wanted)[live], atol=tolerance, rtol=tolerance
    )


def spec_of(length=1000, **options):
    shape = {"batch": 1, "length": length, "num_heads": 4, "num_kv_heads": 1, "head_dim": 128}
    return fa.AttentionSpec(**{**shape, "dtype": jnp.dtype("bfloat16"), "scale": 1.0, **options})


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 3000),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 3000)),
    queries=st.sampled_from([128, 256, 512]),
    keys=st.sampled_from([128, 512, 1024]),
)
def test_the_list_holds_every_visible_pair_once_and_marks_it(length, causal, window, queries, keys):
    spec = spec_of(length, causal=causal, window=window)
    pairs = pair_list(spec, Blocks(queries, keys, 128))
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    visible = (key <= query) if causal else np.ones((length, length), bool)
    if window is not None:
        visible &= np.abs(query - key) < window
    seen = np.zeros_like(visible)
    tiles = []
    for tile, block, flags in map(unpack, pairs.tolist()):
        at = np.s_[tile * queries : (tile + 1) * queries, block * keys : (block + 1) * keys]
        assert visible[at].any()
        assert not seen[at].any()
        seen[at] = True
        if not flags & MASKED:
            assert visible[at].all()
            assert (block + 1) * keys <= length
        assert bool(flags & FIRST) == (not tiles or tiles[-1] != tile)
        tiles.append(tile)
    assert (seen | ~visible).all()
    lasts = [bool(unpack(pair)[2] & LAST) for pair in pairs.tolist()]
    assert lasts == [i + 1 == len(tiles) or tiles[i + 1] != tiles[i] for i in range(len(tiles))]


@pytest.mark.parametrize("length", [1, 100, 129, 2048, 131072])
@pytest.mark.parametrize("groups", [1, 4, 7, 16, 64])
@pytest.mark.parametrize("window", [None, 64, 4096])
def test_blocks_are_whole_registers_and_units_divide_tiles(length, groups, window):
    blocks = choose_blocks(spec_of(length, num_heads=groups, window=window))
    assert blocks.queries % 128 == blocks.keys % 128 == 0
    assert blocks.queries % blocks.unit == 0
    assert min(blocks.queries, blocks.keys) >= 128


def test_what_the_kernel_cannot_serve_is_refused_with_the_reason():
    q = jnp.zeros((1, 16, 1, 640))
    with pytest.raises(
        ImplementationError, match="'tpu' cannot serve: head_dim is 640: the kernel takes up to 512"
    ):
        fa.attend(q, q, q, scale=1.0, implementation="tpu")


def test_a_list_that_does_not_fit_is_refused():
    assert "the list does not fit" in (tpu.why_not(spec_of(4_000_000, window=100_000)) or "")
