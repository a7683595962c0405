"""Rotary tables against transformers' own, for every scaling."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm4_rotation
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jinfer.layers.rope import Rotary, rotate

DIM, LENGTH = 40, 96
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn beyond one band": {
        "factor": 40.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 4.0,
        "beta_slow": 3.9,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.01 * i for i in range(DIM // 2)],
        "long_factor": [1.0 + 0.3 * i for i in range(DIM // 2)],
    },
    "longrope with its own magnitude": {
        "attention_factor": 0.8,
        "original_max_position_embeddings": 400,
        "short_factor": [1.0 + 0.01 * i for i in range(DIM // 2)],
        "long_factor": [9.0] * (DIM // 2),
    },
}
NAMES = {"short_factor": "short_factors", "long_factor": "long_factors"}


def hf_tables(kind: str, values: dict, theta: float, length: int) -> tuple[np.ndarray, np.ndarray]:
    config = LlamaConfig(
        hidden_size=2 * DIM,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **values},
    )
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    return cos[0, :, : DIM // 2].numpy(), sin[0, :, : DIM // 2].numpy()


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", KINDS)
def test_tables_equal_those_of_transformers(name, theta):
    kind, values = name.split()[0], KINDS[name]
    length = 3 * LENGTH  # for dynamic: beyond the original length
    original = values.get("original_max_position_embeddings", LENGTH)
    told: dict[str, Any] = {
        NAMES.get(k, k): tuple(v) if isinstance(v, list) else v
        for k, v in values.items()
        if not k.startswith("original")
    }
    rotary = Rotary(DIM, theta, kind, original=original, **told)
    positions = jnp.arange(length, dtype=jnp.int32)
    cos, sin = rotary.tables(positions, jnp.full(length, length, jnp.int32))
    expected_cos, expected_sin = hf_tables(kind, values, theta, length)
    # An angle of several hundred radians leaves a float32 about 3e-5 of it.
    np.testing.assert_allclose(cos, expected_cos, atol=1e-4)
    np.testing.assert_allclose(sin, expected_sin, atol=1e-4)


def test_dynamic_angles_grow_with_each_tokens_own_length():
    """Tokens of different requests share a step: each has the angles of its own sequence's length."""
    rotary = Rotary(DIM, 10000.0, "dynamic", factor=2.0, original=LENGTH)
    positions = jnp.asarray([5, 5, 200, 95], jnp.int32)
    lengths = jnp.asarray([LENGTH, 201, 201, 50], jnp.int32)
    cos, _ = rotary.tables(positions, lengths)
    short, _ = hf_tables("dynamic", {"factor": 2.0}, 10000.0, LENGTH)
    long, _ = hf_tables("dynamic", {"factor": 2.0}, 10000.0, 201)
    np.testing.assert_allclose(cos, np.stack([short[5], long[5], long[200], short[95]]), atol=1e-4)


def test_longrope_is_chosen_by_each_tokens_own_length():
    factors = {"short_factors": (1.0,) * 4, "long_factors": (2.0, 3.0, 4.0, 5.0)}
    rotary = Rotary(8, 100.0, "longrope", original=10, **factors)
    positions, lengths = jnp.asarray([3, 3, 12], jnp.int32), jnp.asarray([10, 11, 13], jnp.int32)
    cos, _ = rotary.tables(positions, lengths)
    base = 100.0 ** -(np.arange(0, 8, 2) / 8)
    long = base / np.asarray(factors["long_factors"])
    np.testing.assert_allclose(cos, np.cos([3 * base, 3 * long, 12 * long]), atol=1e-5)


def test_only_two_kinds_depend_on_the_length():
    assert [
        kind
        for kind in ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
        if Rotary(8, 1e4, kind).depends_on_length
    ] == ["dynamic", "longrope"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 0.1 * np.log(4.0) + 1),
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * np.log(4.0) + 1) / (0.05 * np.log(4.0) + 1)),
        ({"mscale": 2.0}, 0.1 * np.log(4.0) + 1),
    ],
)
def test_magnitude_of_yarn(values, expected):
    assert Rotary(8, 1e4, "yarn", factor=4.0, original=64, **values).magnitude == pytest.approx(expected)


def test_rotation_equals_that_of_transformers():
    random = np.random.default_rng(0)
    q = random.standard_normal((7, 3, DIM)).astype(np.float32)
    cos, sin = Rotary(DIM, 10000.0).tables(jnp.arange(7, dtype=jnp.int32))
    cos2, sin2 = (torch.tensor(np.concatenate([t, t], axis=-1))[None] for t in (cos, sin))
    heads_first = torch.tensor(q).transpose(0, 1)[None]
    expected = apply_rotary_pos_emb(heads_first, heads_first, cos2, sin2)[0][0].transpose(0, 1).numpy()
    np.testing.assert_allclose(rotate(jnp.asarray(q), cos, sin), expected, atol=1e-6)


@pytest.mark.parametrize("dim", [DIM, 24])
def test_neighbouring_pairs_and_partly_rotated_heads(dim):
    random = np.random.default_rng(2)
    q = random.standard_normal((7, 3, DIM)).astype(np.float32)
    cos, sin = Rotary(dim, 10000.0).tables(jnp.arange(7, dtype=jnp.int32))
    cos2, sin2 = (torch.tensor(np.concatenate([t, t], axis=-1))[None] for t in (cos, sin))
    heads_first = torch.tensor(q).transpose(0, 1)[None]
    expected = glm4_rotation(heads_first, heads_first, cos2, sin2)[0][0].transpose(0, 1).numpy()
    np.testing.assert_allclose(rotate(jnp.asarray(q), cos, sin, interleaved=True), expected, atol=1e-6)
    rotated = rotate(jnp.asarray(q), cos, sin)
    np.testing.assert_array_equal(rotated[..., dim:], q[..., dim:])
    np.testing.assert_array_equal(rotated[..., :dim], rotate(jnp.asarray(q[..., :dim]), cos, sin))


def test_rotation_is_computed_in_float32():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((300, 1, DIM)), jnp.bfloat16)
    cos, sin = Rotary(DIM, 10000.0).tables(jnp.arange(300, dtype=jnp.int32))
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(rotated.astype(jnp.float32), exact.astype(jnp.bfloat16).astype(jnp.float32))
