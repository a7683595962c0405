"""The native CPU kernels against the reference, on ragged steps of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.paged_attention import cpu
from tests.support.ragged import Row, Runner, Shape, Step, make_step

run = Runner()

pytestmark = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))

# Empty, one-token and long rows; contexts on and beside page edges; pages shared with the row before.
DECODES = [Row(1, 8), Row(1, 9), Row(1, 1), Row(1, 96), Row(1, 96, 11), Row(1, 7)]
MIXED = [Row(1, 65), Row(1, 16, 1)], [Row(0, 5), Row(1, 40, 1), Row(30, 95), Row(14, 14)]
BATCHES = {
    "decode": (6, (DECODES, [])),
    "some rows": (6, (DECODES[:3], [])),
    "mixed": (48, MIXED),
    "chunks": (48, ([], [Row(21, 21), Row(27, 64, 2)])),
    "padding": (48, ([], [])),
}
OPTIONS = [
    {},
    {"sliding_window": 3},
    {"sliding_window": 21, "soft_cap": 2.0},
    {"soft_cap": 1.5, "sinks": True},
    {"sliding_window": 5, "sinks": True},
]


def compare(step: Step) -> None:
    """Output and every slot of the pool: the kernel writes this step's slots and no other."""
    output, kv = run(step, "cpu")
    wanted, wanted_kv = run(step, "reference")
    live = int(step.batch.num_tokens)
    np.testing.assert_allclose(output[:live], wanted[:live], atol=1e-5, rtol=1e-5)
    assert not output[live:].any()
    before, pages = np.asarray(step.kv), step.shape.pages_per_layer
    np.testing.assert_array_equal(kv[:pages], before[:pages])
    written = np.broadcast_to(step.written()[:, None, None, :], kv[pages:].shape[:-1])
    np.testing.assert_array_equal(kv[pages:][written], wanted_kv[pages:][written])
    np.testing.assert_array_equal(kv[pages:][~written], before[pages:][~written])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_agrees_with_the_reference(name, options):
    num_tokens, rows = BATCHES[name]
    compare(make_step(Shape(num_tokens=num_tokens, options=options), *rows))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=2, kv_heads=2, head_dim=48),
        Shape(heads=7, kv_heads=1, head_dim=80),
        Shape(heads=15, kv_heads=3, head_dim=112),
        Shape(heads=8, kv_heads=2, head_dim=128, page_size=16, pages_per_row=6),
        Shape(heads=4, kv_heads=2, head_dim=256, page_size=24, pages_per_row=4),
        Shape(dtype="bfloat16", kv_dtype="float32"),
    ],
    ids=lambda shape: f"H{shape.heads}K{shape.kv_heads}D{shape.head_dim}S{shape.page_size}{shape.dtype}",
)
def test_agrees_in_every_shape(shape):
    step = make_step(shape, *MIXED)
    if shape.dtype == "float32":
        compare(step)
        return
    np.testing.assert_allclose(run(step, "cpu")[0][:47], run(step, "reference")[0][:47], atol=1e-2, rtol=1e-2)


def test_a_context_far_longer_than_a_block():
    shape = Shape(
        num_rows=9, num_tokens=200, page_size=16, pages_per_row=32, heads=8, kv_heads=4, head_dim=64
    )
    decodes = [Row(1, n) for n in (500, 3, 127, 128, 129, 300, 512)]
    compare(make_step(shape, decodes, [Row(130, 470), Row(60, 60)]))


def test_a_row_is_the_same_whatever_stands_beside_it():
    step = make_step(Shape(num_tokens=6), DECODES)
    alone = make_step(Shape(num_tokens=6), DECODES[3:4])
    table = jnp.zeros_like(alone.batch.page_table).at[0].set(step.batch.page_table[3])
    alone = Step(
        **{
            **vars(alone),
            "batch": jax.tree.map(
                lambda x: x, alone.batch.__class__(**{**vars(alone.batch), "page_table": table})
            ),
            "q": step.q.at[0].set(step.q[3]),
            "k": step.k.at[0].set(step.k[3]),
            "v": step.v.at[0].set(step.v[3]),
            "kv": step.kv,
        }
    )
    np.testing.assert_array_equal(run(alone, "cpu")[0][0], run(step, "cpu")[0][3])


def test_logits_of_any_size_stay_finite():
    step = make_step(Shape(num_tokens=6), DECODES)
    for factor in (1e3, -1e3):
        big = Step(**{**vars(step), "q": step.q * factor})
        np.testing.assert_allclose(run(big, "cpu")[0], run(big, "reference")[0], atol=1e-3, rtol=1e-3)


def test_what_lies_in_slots_behind_a_row_does_not_matter():
    step = make_step(Shape(), *MIXED)
    dirty = np.where(
        step.owned()[None, :, None, None, :, None], np.asarray(step.kv).reshape(2, -1, 2, 2, 8, 16), np.nan
    )
    clean = run(step, "cpu")[0]
    np.testing.assert_array_equal(
        run(Step(**{**vars(step), "kv": jnp.asarray(dirty.reshape(step.kv.shape))}), "cpu")[0], clean
    )


def test_what_the_kernels_do_not_know_is_refused_by_name():
    spec = cpu.KVSpec(4, 8, 2, 20, jnp.dtype("float32"))
    assert "head_dim is 20" in str(cpu.why_not(spec))
    assert "int8" in str(cpu.why_not(cpu.KVSpec(4, 8, 2, 32, jnp.dtype("int8"))))


def test_a_tree_of_drafts_goes_to_the_xla_path():
    step = make_step(Shape(tree_words=1), [Row(1, 9)], [Row(5, 21, 0, (0, 0, 1, 2))])
    np.testing.assert_allclose(run(step, "cpu")[0][:6], run(step, "reference")[0][:6], atol=1e-5, rtol=1e-5)
