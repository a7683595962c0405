"""Fused qkv weights are regrouped for another number of devices, exactly as loading for that number makes them."""

import numpy as np
import pytest

from jinfer.errors import ModelError
from jinfer.models.refit import refit_kv_heads

HEADS, KV_HEADS, HEAD_DIM, EMBED = 8, 2, 4, 6
PATH = "stack.layers.0.attention.qkv."


def fused(groups: int, rest: tuple[int, ...]) -> np.ndarray:
    """q, k, v heads in `groups` groups, each value naming its head and part; KV heads repeat in neighbouring groups."""
    array = np.zeros((groups, HEADS // groups + 2, HEAD_DIM, *rest), np.float32)
    for head in range(HEADS):
        array[head // (HEADS // groups), head % (HEADS // groups)] = head
    for group in range(groups):
        kv = group * KV_HEADS // groups
        array[group, -2:] = 100 + kv
        array[group, -1] += 50
    return array + np.arange(HEAD_DIM).reshape(-1, *[1] * len(rest)) / 10


@pytest.mark.parametrize(("part", "rest"), [("weight", (EMBED,)), ("bias", ())])
@pytest.mark.parametrize("after", [2, 4, 8])
@pytest.mark.parametrize("before", [2, 4, 8])
def test_regroups_as_if_made_so(before, after, part, rest):
    saved, wanted = fused(before, rest), fused(after, rest)
    refit = refit_kv_heads(PATH + part, saved.shape, wanted.shape)
    assert refit is not None
    np.testing.assert_array_equal(refit(saved), wanted)


@pytest.mark.parametrize("after", [2, 4, 8])
@pytest.mark.parametrize("before", [2, 4, 8])
def test_norms_of_all_keys_follow_their_heads(before, after):
    norms = np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32).reshape(KV_HEADS, HEAD_DIM)
    saved, wanted = (np.repeat(norms, count // KV_HEADS, axis=0) for count in (before, after))
    refit = refit_kv_heads("stack.layers.0.attention.k_norm.weight", saved.shape, wanted.shape)
    assert refit is not None
    np.testing.assert_array_equal(refit(saved), wanted)


@pytest.mark.parametrize(
    ("path", "saved", "wanted"),
    [
        ("stack.layers.0.attention.k_norm.weight", (2, 6), (4, 8)),
        ("stack.layers.0.attention.k_norm.weight", (2, 6), (3, 6)),
        ("stack.layers.0.attention.k_norm.weight", (6,), (8,)),
        ("stack.layers.0.mlp.up.weight", (2, 6, 4, 6), (4, 4, 4, 6)),
        (PATH + "weight", (2, 6, 4, 6), (4, 4, 4, 7)),
        (PATH + "weight", (2, 6, 4, 6), (4, 4, 8, 6)),
        (PATH + "weight", (2, 6, 4, 6), (4, 6, 4, 6)),
        (PATH + "weight", (2, 6, 4, 6), (3, 4, 4, 6)),
        (PATH + "weight", (6, 4, 4, 6), (4, 5, 4, 6)),
        (PATH + "weight", (2, 2, 4, 6), (4, 2, 4, 6)),
        (PATH + "bias", (2, 6), (4, 4)),
        (PATH + "weight", (2, 6, 4), (4, 4, 4, 6)),
    ],
)
def test_other_shapes_are_left_alone(path, saved, wanted):
    assert refit_kv_heads(path, saved, wanted) is None


def test_different_kv_heads_are_not_dropped():
    saved = fused(4, ())
    saved[1, -1] += 1
    refit = refit_kv_heads(PATH + "bias", saved.shape, (2, 6, 4))
    assert refit is not None
    with pytest.raises(ModelError, match="holds 4 different KV heads"):
        refit(saved)
