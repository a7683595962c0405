"""The oracle itself, against attention computed row by row in float64 from each row's own history."""

import numpy as np
import pytest

from tests.support.ragged import Row, Runner, Shape, Step, make_step

OPTIONS = [
    {},
    {"sliding_window": 3},
    {"sliding_window": 20},
    {"soft_cap": 1.5},
    {"sinks": True},
    {"sliding_window": 5, "soft_cap": 2.0, "sinks": True},
]


def sees(row: Row, token: int, key: int) -> bool:
    """Whether a new token sees new token `key` (negative: an earlier one) by the tree of drafts."""
    if row.parents is None or key < 0:
        return True
    while token > key:
        token = row.parents[token - 1]
    return token == key


def expected(step: Step, kv: np.ndarray, row: int, layer: int) -> np.ndarray:
    """Dense attention of one row's new tokens, from the pool that holds them: [tokens, H, D]."""
    shape, live = step.shape, step.rows[row]
    options = shape.options
    pages = np.asarray(step.batch.page_table)[row] + layer * shape.pages_per_layer
    start = int(step.batch.query_starts[row])
    output = np.zeros((live.tokens, shape.heads, shape.head_dim))
    for t in range(live.tokens):
        position = live.context - live.tokens + t
        seen = range(max(0, position + 1 - options.get("sliding_window", 10**9)), position + 1)
        for head in range(shape.heads):
            at = [
                (pages[j // shape.page_size], head // (shape.heads // shape.kv_heads), j % shape.page_size)
                for j in seen
                if sees(live, t, j - live.context + live.tokens)
            ]
            scales = {name: np.asarray(x, np.float64) for name, x in shape.scales().items()}
            kv_head = head // (shape.heads // shape.kv_heads)
            keys = np.array([kv[p, 0, h, s] for p, h, s in at], np.float64)
            values = np.array([kv[p, 1, h, s] for p, h, s in at], np.float64)
            if scales:
                keys, values = keys * scales["k_scale"][kv_head], values * scales["v_scale"][kv_head]
            logits = keys @ np.asarray(step.q[start + t, head], np.float64) * shape.scale
            if "soft_cap" in options:
                logits = options["soft_cap"] * np.tanh(logits / options["soft_cap"])
            weights = np.exp(logits)
            sink = np.exp(np.linspace(-1.0, 2.0, shape.heads)[head]) if options.get("sinks") else 0.0
            output[t, head] = weights @ values / (weights.sum() + sink)
    return output


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_dense_attention(options):
    shape = Shape(options=options)
    step = make_step(shape, [Row(1, 1), Row(1, 8), Row(1, 41, shared_pages=1)], [Row(7, 7), Row(12, 30)])
    output, kv = Runner()(step, "reference")
    for row in range(len(step.rows)):
        start, end = np.asarray(step.batch.query_starts)[row : row + 2]
        np.testing.assert_allclose(output[start:end], expected(step, kv, row, 1), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "shape", [Shape(tree_words=1), Shape(kv_dtype="int8"), Shape(kv_dtype="float8_e4m3fn", tree_words=2)]
)
def test_reference_knows_trees_and_scales(shape):
    tree = (0, 0, 1, 1, 2, 5) if shape.tree_words else None
    step = make_step(shape, [Row(1, 41)], [Row(7, 20, 0, tree), Row(12, 30)])
    output, kv = Runner()(step, "reference")
    for row in range(len(step.rows)):
        start, end = np.asarray(step.batch.query_starts)[row : row + 2]
        np.testing.assert_allclose(output[start:end], expected(step, kv, row, 1), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantized_keys_and_values_are_within_the_quantizers_error(dtype):
    step = make_step(Shape(kv_dtype=dtype), [Row(1, 17)], [Row(9, 20)])
    _, kv = Runner()(step, "reference")
    page, slot = step.batch.token_slots(48, 8)
    for half, (name, new) in enumerate((("k_scale", step.k), ("v_scale", step.v))):
        scale = np.asarray(step.shape.scales()[name])[:, None]
        largest = scale * (127.0 if dtype == "int8" else 448.0)
        for token in range(10):
            kept = kv[int(page[token]) + step.shape.pages_per_layer, half, :, int(slot[token])] * scale
            wanted = np.clip(np.asarray(new[token]), -largest, largest)
            # int8: half a step; fp8: half of the last of its three bits, or half of the smallest step below 2^-6.
            error = scale / 2 if dtype == "int8" else np.maximum(np.abs(wanted) / 16, scale * 2.0**-10)
            assert (np.abs(kept - wanted) <= error * 1.0001).all()


def test_reference_keeps_the_new_tokens_in_their_slots():
    step = make_step(Shape(), [Row(1, 17)], [Row(9, 20)])
    _, kv = Runner()(step, "reference")
    page, slot = step.batch.token_slots(48, 8)
    for token in range(10):
        at = int(page[token]) + step.shape.pages_per_layer
        np.testing.assert_array_equal(kv[at, 0, :, int(slot[token])], step.k[token])
        np.testing.assert_array_equal(kv[at, 1, :, int(slot[token])], step.v[token])
