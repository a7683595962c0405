"""The GPU kernels in interpret mode, with race detection, against the reference; and what they refuse."""

import logging
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from pallas_kernels import ImplementationError, dispatch, gpu_parts
from pallas_kernels import paged_attention as pa
from pallas_kernels.gpu_tiles import TileConfig
from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.gpu_config import DecodeConfig
from tests.support.gpu_interpreter import gpu_interpreted
from tests.support.ragged import Row, Runner, Shape, Step, make_step

run = Runner()


@pytest.fixture(autouse=True)
def small_chip(monkeypatch):
    """Two multiprocessors, so that work queues up and contexts are split; two stages, so that they are reused."""
    monkeypatch.setattr(gpu, "decode_config", lambda page_size, head_dim: DecodeConfig(64, 2, 2))
    monkeypatch.setattr(gpu, "prompt_config", lambda page_size, head_dim: TileConfig(64, 2, 2))


def compare(step: Step, layer: int = 1) -> None:
    with gpu_interpreted():
        output, kv = run(step, "gpu", layer)
    live = int(step.batch.num_tokens)
    exact = replace(step, shape=replace(step.shape, dtype="float32", kv_dtype="bfloat16"), q=_wide(step.q))
    wanted, wanted_kv = run(exact, "reference", layer)
    np.testing.assert_allclose(output[:live], wanted[:live], atol=1e-2, rtol=1e-2)
    assert np.isfinite(output).all()
    # Padded tokens go to the null page in one, nowhere in the other.
    null = layer * step.shape.pages_per_layer
    np.testing.assert_array_equal(np.delete(kv, null, 0), np.delete(wanted_kv, null, 0))


def _wide(x):
    return x.astype(jnp.float32)


def gpu_shape(**changes) -> Shape:
    small = {"num_rows": 4, "page_size": 32, "pages_per_row": 5, "num_tokens": 40, "head_dim": 64}
    return Shape(**{**small, "dtype": "bfloat16", **changes})


@st.composite
def ragged_rows(draw, shape: Shape) -> tuple[list[Row], list[Row]]:
    """Decode rows and chunks on and beside page edges, empty, one token, with long contexts, sharing pages."""
    longest, size = shape.pages_per_row * shape.page_size, shape.page_size
    edges = [n + d for n in range(size, longest, size) for d in (-1, 0, 1)]
    contexts = st.one_of(st.integers(1, longest), st.sampled_from([1, longest, *edges]))
    rows: list[Row] = []

    def add(tokens: int, context: int) -> None:
        shared = min(context - tokens, rows[-1].context - rows[-1].tokens) // size if rows else 0
        rows.append(Row(tokens, context, draw(st.integers(0, max(shared, 0)))))

    for _ in range(draw(st.integers(0, min(shape.num_rows, shape.num_tokens)))):
        add(1, draw(contexts))
    decodes = len(rows)
    while shape.num_tokens > shape.num_rows > len(rows) and draw(st.booleans()):
        context = draw(contexts)
        most = min(context, shape.num_tokens - sum(row.tokens for row in rows))
        add(draw(st.sampled_from([0, most, most // 2])), context)
    return rows[:decodes], rows[decodes:]


quick = settings(
    max_examples=4,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
SHAPES = {
    "mixed": gpu_shape(),
    "mixed, window below a page, cap, sinks": gpu_shape(
        heads=7, kv_heads=1, options={"sliding_window": 5, "soft_cap": 2.0, "sinks": True}
    ),
    "mixed, pages of 16, heads of 80": gpu_shape(
        heads=2, page_size=16, head_dim=80, pages_per_row=9, options={"sliding_window": 40}
    ),
    "decode": gpu_shape(num_tokens=4, head_dim=96, options={"soft_cap": 5.0}),
    "decode, window, sinks": gpu_shape(
        num_tokens=4, page_size=64, pages_per_row=3, options={"sliding_window": 70, "sinks": True}
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


def test_verification_rows_see_their_ancestors_only():
    shape = gpu_shape(tree_words=1, heads=4, options={"sinks": True})
    tree = (0, 0, 1, 1, 2, 5)
    compare(make_step(shape, [Row(1, 70)], [Row(7, 72, 0, tree), Row(25, 60)]))


def test_what_an_earlier_owner_left_does_not_matter():
    """A NaN in a masked slot would pass through a product with weight 0."""
    shape = SHAPES["mixed"]
    step = make_step(shape, [Row(1, 9), Row(1, 97)], [Row(11, 11), Row(9, 25)])
    dirty = np.array(step.kv)
    dirty.swapaxes(1, 3)[~np.concatenate([step.owned(), step.owned()])] = np.nan
    with gpu_interpreted():
        clean, _ = run(step, "gpu")
        output, _ = run(replace(step, kv=jnp.asarray(dirty)), "gpu")
    live = int(step.batch.num_tokens)
    np.testing.assert_array_equal(output[:live], clean[:live])


def test_many_query_heads_of_one_kv_head_take_several_tiles():
    shape = gpu_shape(num_rows=2, num_tokens=6, heads=71, kv_heads=1, options={"sinks": True})
    compare(make_step(shape, [Row(1, 70)], [Row(5, 66)]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "bfloat16"),
        ({"head_dim": 72}, "head sizes"),
        ({"page_size": 48}, "page sizes"),
        ({}, "Hopper"),
    ],
)
def test_refuses_what_it_cannot_serve(changes, reason):
    arguments = {
        "num_pages": 4,
        "page_size": 16,
        "num_kv_heads": 2,
        "head_dim": 64,
        "dtype": jnp.bfloat16,
    } | changes
    with pytest.raises(ImplementationError, match=reason):
        pa.kv_shape(**arguments, implementation="gpu")


@pytest.mark.parametrize(("kind", "served"), [("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)])
def test_automatic_choice_knows_the_generation(monkeypatch, caplog, kind, served):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    monkeypatch.setattr(gpu_parts, "target_kind", lambda: kind)
    dispatch._log_fallback.cache_clear()
    pool = pa.kv_shape(4, 16, 2, 64, jnp.bfloat16)
    batch = make_step(gpu_shape(), [Row(1, 5)]).batch
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            plan = pa.prepare(batch, pool, 40)
    assert plan.implementation == ("gpu" if served else "xla")
    told = [record.message for record in caplog.records if kind in record.message]
    assert len(told) == (0 if served else 1)
