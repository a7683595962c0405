"""The XLA path against the reference, on ragged steps of every kind."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import api, xla
from tests.support.ragged import Row, Runner, Shape, Step, make_step

OPTIONS = [
    {},
    {"sliding_window": 3},
    {"sliding_window": 21, "soft_cap": 2.0},
    {"soft_cap": 1.5, "sinks": True},
    {"sliding_window": 5, "sinks": True},
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
run = Runner()


@pytest.fixture
def patched(monkeypatch):
    """A patch for what is read while tracing: nothing traced before or after it is mistaken for it."""

    def forget():
        api._attend.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        run.clear()

    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def small_blocks(patched):
    """Loops of several steps in small shapes: groups of 2 rows, blocks of 2 pages, tiles of 8 queries."""
    patched.setattr(
        xla, "choose_blocks", lambda heads, dim, rows, tokens: xla.Blocks(2, 16, min(8, tokens), 16, True)
    )


@st.composite
def ragged_rows(draw, shape: Shape) -> tuple[list[Row], list[Row]]:
    """Decode rows and chunks: on and beside page edges, empty, one token, with long contexts, sharing pages."""
    longest, size = shape.pages_per_row * shape.page_size, shape.page_size
    edges = [
        n
        for k in range(1, shape.pages_per_row + 1)
        for n in (size * k - 1, size * k, size * k + 1)
        if n <= longest
    ]
    context = st.one_of(st.integers(1, longest), st.sampled_from(edges), st.sampled_from([1, longest]))

    def shared(before: Row | None, limit: int) -> int:
        if before is None:
            return 0
        # Only full pages that neither row writes in this step.
        most = min(limit, before.context - before.tokens) // size
        return draw(st.integers(0, most)) if most > 0 else 0

    decodes, chunks, left = [], [], shape.num_tokens
    before = None
    for _ in range(draw(st.integers(0, shape.num_rows))):
        length = draw(context)
        before = Row(1, length, shared(before, length - 1))
        decodes.append(before)
        left -= 1
    if shape.num_tokens == shape.num_rows:
        return decodes, []
    for _ in range(draw(st.integers(0, shape.num_rows - len(decodes)))):
        length = draw(context)
        tokens = draw(st.one_of(st.integers(0, min(left, length)), st.just(min(left, length))))
        before = Row(tokens, length, shared(before, length - tokens))
        chunks.append(before)
        left -= tokens
    return decodes, chunks


def compare(step: Step, layer: int = 1) -> None:
    output, kv = run(step, "xla", layer)
    wanted, wanted_kv = run(step, "reference", layer)
    live = int(step.batch.num_tokens)
    tolerance = TOLERANCE[step.shape.dtype]
    np.testing.assert_allclose(output[:live], wanted[:live], atol=tolerance, rtol=tolerance)
    assert np.isfinite(output).all()
    # Every slot that a row can read is as it should be, and every page without a written slot is untouched.
    per_layer = step.shape.pages_per_layer
    before = np.asarray(step.kv, np.float32)
    for index in range(step.shape.layers):
        pages = slice(index * per_layer, (index + 1) * per_layer)
        touched = step.written() if index == layer else np.zeros_like(step.written())
        idle = ~touched.any(axis=1)
        np.testing.assert_array_equal(kv[pages][idle], before[pages][idle])
        owned = np.broadcast_to(step.owned()[:, None, None, :], kv[pages].shape[:-1])
        source = wanted_kv if index == layer else before
        np.testing.assert_array_equal(kv[pages][owned], source[pages][owned])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_tokens", [48, 6], ids=["mixed", "decode"])
def test_agrees_with_the_reference(small_blocks, num_tokens, options):
    shape = Shape(num_tokens=num_tokens, options=options)

    @settings(max_examples=25, deadline=None)
    @given(rows=ragged_rows(shape), seed=st.integers(0, 2**16), layer=st.integers(0, 1))
    @example(rows=([], []), seed=0, layer=1)
    @example(
        rows=([Row(1, 8), Row(1, 9), Row(1, 1), Row(1, 96), Row(1, 96, 11), Row(1, 7)], []), seed=1, layer=0
    )
    def check(rows, seed, layer):
        compare(make_step(shape, *rows, seed=seed), layer)

    check()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(kv_dtype="int8"),
        Shape(kv_dtype="int8", dtype="bfloat16", num_tokens=6),
        Shape(kv_dtype="float8_e4m3fn"),
        Shape(heads=2, kv_heads=2, head_dim=48),
        Shape(heads=7, kv_heads=1, head_dim=20),
        Shape(heads=8, kv_heads=2, head_dim=128, page_size=16, pages_per_row=6),
        Shape(heads=4, kv_heads=2, head_dim=64, page_size=128, pages_per_row=2),
        Shape(heads=4, kv_heads=2, page_size=24, pages_per_row=5, num_tokens=21),
        Shape(num_rows=1, num_tokens=1),
        Shape(num_rows=1, num_tokens=3),
        Shape(dtype="bfloat16"),
        Shape(dtype="bfloat16", num_tokens=6),
    ],
    ids=lambda shape: (
        f"H{shape.heads}K{shape.kv_heads}D{shape.head_dim}S{shape.page_size}T{shape.num_tokens}{shape.dtype}"
        f"{shape.kv_dtype or ''}"
    ),
)
def test_agrees_with_the_reference_in_every_shape(shape):
    @settings(max_examples=12, deadline=None)
    @given(rows=ragged_rows(shape), seed=st.integers(0, 2**16))
    def check(rows, seed):
        compare(make_step(shape, *rows, seed=seed))

    check()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 12, "soft_cap": 2.0}], ids=str)
def test_a_tree_of_drafts_sees_its_ancestors_only(small_blocks, options):
    shape = Shape(num_tokens=60, tree_words=2, options=options)
    wide = tuple(i // 2 for i in range(35))
    step = make_step(
        shape,
        [Row(1, 9)],
        [Row(5, 21, 0, (0, 0, 1, 2)), Row(36, 50, 0, wide), Row(9, 9), Row(3, 33, 0, (0, 1))],
    )
    compare(step)


def test_a_context_far_longer_than_a_block():
    """With the block sizes of this platform: several blocks, several groups."""
    shape = Shape(
        num_rows=12, num_tokens=200, page_size=16, pages_per_row=32, heads=8, kv_heads=4, head_dim=64
    )
    decodes = [Row(1, n) for n in (500, 3, 64, 65, 63, 300, 128, 1, 512)]
    compare(make_step(shape, decodes, [Row(130, 470), Row(60, 60)]))


@pytest.mark.parametrize("num_tokens", [48, 6], ids=["mixed", "decode"])
def test_what_an_earlier_owner_left_in_a_page_does_not_matter(small_blocks, num_tokens):
    """A NaN in a masked slot would pass through a product with weight 0."""
    shape = Shape(num_tokens=num_tokens)
    chunks = [Row(11, 11), Row(9, 25)] if num_tokens > 6 else []
    step = make_step(shape, [Row(1, 9), Row(1, 1), Row(1, 17)], chunks)
    clean, _ = run(step, "xla")
    # Pages that this step starts are full of NaN: their slot 0 is written now.
    started = step.written()[:, 0]
    dirty = np.asarray(step.kv).copy()
    dirty[step.shape.pages_per_layer :][started] = np.nan
    step = Step(**{**vars(step), "kv": jnp.asarray(dirty)})
    output, _ = run(step, "xla")
    live = int(step.batch.num_tokens)
    np.testing.assert_array_equal(output[:live], clean[:live])


def test_padded_rows_and_tokens_write_nothing():
    step = make_step(Shape(), [Row(1, 9)], [Row(4, 4)])
    _, kv = run(step, "xla")
    null = step.shape.pages_per_layer
    np.testing.assert_array_equal(kv[null], np.asarray(step.kv)[null])


def test_agrees_with_the_block_sizes_of_other_platforms(patched):
    patched.setattr(xla, "current_platform", lambda: "gpu")
    shape = Shape(options={"sliding_window": 30})
    compare(make_step(shape, [Row(1, 9), Row(1, 96)], [Row(4, 4), Row(30, 90)]))
