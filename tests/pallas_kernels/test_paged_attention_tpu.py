"""The TPU kernels in interpret mode, with race detection, against the reference.

Interpreting a kernel takes seconds to compile and little to run, so shapes are few and examples many.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention import api, tpu, tpu_blocks
from tests.support.ragged import Row, Runner, Shape, Step, make_step

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# Loops of several steps in small shapes: blocks of 2 pages in a ring of 3, tiles of 8 queries and of 4.
SMALL = tpu_blocks.Blocks(2, 3, 1, 8, 4, 2, 3, 1, 64 * 2**20)
run = Runner()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(tpu_blocks, "choose", lambda shape, window: SMALL)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def compare(step: Step, layer: int = 1) -> None:
    output, kv = run(step, "tpu", layer)
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    wanted, wanted_kv = run(step, "reference", layer)
    live = int(step.batch.num_tokens)
    tolerance = TOLERANCE[step.shape.dtype]
    np.testing.assert_allclose(output[:live], wanted[:live], atol=tolerance, rtol=tolerance)
    assert np.isfinite(output).all()
    # Every slot that a row can read is as it should be, and every page without a written slot is untouched.
    before, per_layer = np.asarray(step.kv, np.float32), step.shape.pages_per_layer
    for index in range(step.shape.layers):
        pages = slice(index * per_layer, (index + 1) * per_layer)
        touched = step.written() if index == layer else np.zeros_like(step.written())
        idle = ~touched.any(axis=1)
        np.testing.assert_array_equal(kv[pages][idle], before[pages][idle])
        owned = np.broadcast_to(step.owned()[:, None, None, :], kv[pages].shape[:-1])
        source = wanted_kv if index == layer else before
        np.testing.assert_array_equal(kv[pages][owned], source[pages][owned])


def tpu_shape(**changes) -> Shape:
    return Shape(**{"num_rows": 4, "head_dim": 64, "pages_per_row": 6, "num_tokens": 28, **changes})


def latent_shape(**changes) -> Shape:
    """Keys that are the values, one head of them, of a size that is no multiple of the lanes."""
    return tpu_shape(**{"shared_values": True, "kv_heads": 1, "heads": 4, "head_dim": 144, **changes})


@st.composite
def ragged_rows(draw, shape: Shape) -> tuple[list[Row], list[Row]]:
    """Decode rows and chunks: on and beside page edges, empty, one token, with long contexts, sharing pages, trees."""
    longest, size = shape.pages_per_row * shape.page_size, shape.page_size
    edges = [n + d for n in range(size, longest, size) for d in (-1, 0, 1)]
    context = st.one_of(st.integers(1, longest), st.sampled_from(edges), st.sampled_from([1, longest]))
    before = None

    def row(tokens: int, length: int) -> Row:
        limit = min(length - tokens, before.context - before.tokens) // size if before else 0
        shared = draw(st.integers(0, limit)) if limit > 0 else 0
        parents = None
        if shape.tree_words and 1 < tokens <= 32 * shape.tree_words and draw(st.booleans()):
            parents = tuple(draw(st.integers(0, index)) for index in range(tokens - 1))
        return Row(tokens, length, shared, parents)

    decodes, chunks = [], []
    for _ in range(draw(st.integers(0, min(shape.num_rows, shape.num_tokens)))):
        before = row(1, draw(context))
        decodes.append(before)
    left = shape.num_tokens - len(decodes)
    if shape.num_tokens == shape.num_rows:
        return decodes, []
    for _ in range(draw(st.integers(0, shape.num_rows - len(decodes)))):
        length = draw(context)
        tokens = draw(st.one_of(st.integers(0, min(left, length)), st.just(min(left, length))))
        before = row(tokens, length)
        chunks.append(before)
        left -= tokens
    return decodes, chunks


# Shrinking would take as long as the whole file.
quick = settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SHAPES = {
    "plain": tpu_shape(),
    "window below a page, sinks": tpu_shape(options={"sliding_window": 3, "sinks": True}),
    "window, cap, two slabs": tpu_shape(
        head_dim=128, options={"sliding_window": 21, "soft_cap": 2.0}, num_tokens=30
    ),
    "trees": tpu_shape(tree_words=1, options={"sinks": True}, num_tokens=40),
    "heads of 256": tpu_shape(heads=2, kv_heads=1, head_dim=256),
    "bfloat16": tpu_shape(dtype="bfloat16", page_size=16, heads=7, kv_heads=1, head_dim=96),
    "int8": tpu_shape(kv_dtype="int8", page_size=32, pages_per_row=3, dtype="bfloat16", head_dim=80),
    "fp8": tpu_shape(kv_dtype="float8_e4m3fn", page_size=32, pages_per_row=3, dtype="bfloat16"),
    "decode": tpu_shape(num_tokens=4, heads=9, kv_heads=1),
    "decode, window, sinks": tpu_shape(num_tokens=4, options={"sliding_window": 11, "sinks": True}),
    "decode, int8, cap": tpu_shape(
        num_tokens=4, kv_dtype="int8", page_size=32, dtype="bfloat16", options={"soft_cap": 3.0}
    ),
    "fewer tokens than rows": tpu_shape(num_tokens=3),
    "latents": latent_shape(options={"value_dim": 128}),
    # 8 heads of float32 and 16 of bfloat16 are whole tiles: their rows are ordered by token.
    "latents, window, cap, sinks": latent_shape(
        heads=8,
        head_dim=36,
        options={"sliding_window": 11, "soft_cap": 2.0, "sinks": True, "value_dim": 32},
    ),
    "latents, trees, bfloat16": latent_shape(
        dtype="bfloat16", page_size=16, heads=16, tree_words=1, options={"value_dim": 100}
    ),
    "latents, int8": latent_shape(heads=16, kv_dtype="int8", page_size=32, pages_per_row=3, dtype="bfloat16"),
    "latents, decode": latent_shape(num_tokens=4, heads=9, options={"value_dim": 120}),
    "latents, decode, fp8, window": latent_shape(
        num_tokens=4,
        kv_dtype="float8_e4m3fn",
        page_size=32,
        dtype="bfloat16",
        options={"sliding_window": 40},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_agrees_with_the_reference(name):
    shape = SHAPES[name]

    @quick
    @given(rows=ragged_rows(shape), seed=st.integers(0, 2**16), layer=st.integers(0, 1))
    @example(rows=([], []), seed=0, layer=1)
    def check(rows, seed, layer):
        compare(make_step(shape, *rows, seed=seed), layer)

    check()


@pytest.mark.parametrize("name", ["plain", "latents"])
def test_what_an_earlier_owner_left_does_not_matter(name):
    """A NaN in a masked slot would pass through a product with weight 0."""
    shape = SHAPES[name]
    step = make_step(shape, [Row(1, 9), Row(1, 17)], [Row(11, 11), Row(9, 25)])
    clean, _ = run(step, "tpu")
    dirty = np.array(step.kv)
    unowned = ~np.concatenate([step.owned(), step.owned()])
    dirty.swapaxes(1, 3)[unowned] = np.nan
    output, _ = run(replace(step, kv=jnp.asarray(dirty)), "tpu")
    live = int(step.batch.num_tokens)
    np.testing.assert_array_equal(output[:live], clean[:live])


@pytest.fixture
def fresh():
    """Nothing traced before or after is mistaken for what is traced with a patch."""

    def forget():
        api._attend.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        run.clear()

    forget()
    yield
    forget()


def test_a_table_too_large_for_scalar_memory_is_split(fresh, monkeypatch):
    shape = tpu_shape()
    monkeypatch.setattr(tpu, "TABLE_BYTES", 3 * 4 * shape.pages_per_row)
    compare(make_step(shape, [Row(1, 9), Row(1, 48)], [Row(11, 30), Row(9, 9)]))
    compare(make_step(shape, [Row(1, 9), Row(1, 48), Row(1, 7), Row(1, 8)]), layer=0)


def test_two_cores_share_the_heads(fresh, monkeypatch):
    monkeypatch.setattr(tpu_blocks, "choose", lambda shape, window: replace(SMALL, cores=2))
    compare(make_step(tpu_shape(options={"sinks": True}), [Row(1, 9), Row(1, 33)], [Row(11, 30)]))


@pytest.mark.parametrize("heads", [8, 16])  # of which a core's half is part of a tile, or whole
def test_two_cores_share_the_rows_and_queries_of_one_head(fresh, monkeypatch, heads):
    monkeypatch.setattr(tpu_blocks, "choose", lambda shape, window: replace(SMALL, cores=2))
    shape = latent_shape(heads=heads, options={"sinks": True}, num_rows=6)
    compare(make_step(shape, [Row(1, n) for n in (9, 33, 1, 40, 17)], [Row(11, 30)]))
    compare(make_step(shape, [Row(1, 20)], [Row(11, 30), Row(9, 9)]), layer=0)
    compare(make_step(replace(shape, num_tokens=6), [Row(1, n) for n in (9, 33, 1)]))
