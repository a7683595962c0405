"""The small layers against their formulas, in float64 or in torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

from jinfer.layers.attention import causal_attention
from jinfer.layers.linear import Linear, embed, project
from jinfer.layers.mlp import ACTIVATIONS
from jinfer.layers.norm import RMSNorm
from jinfer.layers.parameter import Build, parameter
from jinfer.layers.stack import LayerStack

RANDOM = np.random.default_rng(0)


def array(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(RANDOM.standard_normal(shape), dtype)


@pytest.mark.parametrize("weight_first", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 8, 33])
def test_project_is_the_einsum_it_says(weight_first, tokens):
    weight, x = array(3, 5, 4, 6), array(tokens, 4, 6)
    actual = project(weight, x, num_in=2, weight_first=weight_first)
    np.testing.assert_allclose(actual, np.einsum("abij,tij->tab", weight, x), rtol=1e-5, atol=1e-5)
    flat = project(weight[0, :, 0], x[:, 0], weight_first=weight_first)
    np.testing.assert_allclose(
        flat, np.asarray(x[:, 0]) @ np.asarray(weight[0, :, 0]).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("weight_first", [True, False])
def test_project_accumulates_as_asked(weight_first):
    weight, x = array(8, 64, dtype=jnp.bfloat16), array(2, 64, dtype=jnp.bfloat16)
    assert project(weight, x, weight_first=weight_first).dtype == jnp.bfloat16
    wide = project(weight, x, weight_first=weight_first, accumulate=jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)


def filled(module: nnx.Module) -> Any:
    """The module with random parameters in place of their shapes."""
    graph, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(
        graph, jax.tree.unflatten(tree, [p.replace(array(*p.get_value().shape)) for p in leaves])
    )


def test_linear_with_bias():
    layer = filled(Linear(Build(), (2, 3), (4,), (None, None), ("embed",), bias=True))
    x = array(5, 4)
    expected = np.einsum("abi,ti->tab", layer.weight[...], x) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_embedding_takes_rows():
    table = array(7, 3)
    np.testing.assert_array_equal(embed(table, jnp.asarray([6, 0, 6])), np.asarray(table)[[6, 0, 6]])


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norm(eps):
    layer = filled(RMSNorm(Build(), 16, eps))
    x = array(4, 16)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * np.asarray(layer.weight[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)


def test_norm_of_small_numbers_in_half_precision():
    """Squares of bfloat16 inputs are summed in float32."""
    layer: Any = RMSNorm(Build(dtype=jnp.bfloat16), 64, 1e-12)
    layer.weight = layer.weight.replace(jnp.ones(64, jnp.bfloat16))
    y = layer(array(2, 64, dtype=jnp.bfloat16) * jnp.bfloat16(1e-3))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(np.asarray(y, np.float64) ** 2, axis=1), 1, rtol=2e-2)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_those_of_transformers(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_causal_attention():
    q, k, v = array(2, 9, 6, 4), array(2, 9, 2, 4), array(2, 9, 2, 4)
    heads_first = (torch.tensor(np.asarray(t)).transpose(1, 2) for t in (q, k, v))
    wide_q, wide_k, wide_v = heads_first
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    expected = attention(wide_q, wide_k, wide_v, is_causal=True, scale=0.3, enable_gqa=True)
    actual = causal_attention(q, k, v, 0.3)
    np.testing.assert_allclose(actual, expected.transpose(1, 2).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_stack_runs_its_layers_in_order(scan):
    class Layer(nnx.Module):
        def __init__(self, build: Build) -> None:
            self.weight = parameter(build, (2,), (None,))

    weights = array(3, 2)
    stack: Any = LayerStack(Build(), 3, Layer, scan=scan)
    if scan:
        assert stack.layer.weight.get_value().shape == (3, 2)
        stack.layer.weight = stack.layer.weight.replace(weights)
    else:
        for layer, weight in zip(stack.layers, weights, strict=True):
            layer.weight = layer.weight.replace(weight)
    result = stack(
        lambda layer, index, x: x * 2 + layer.weight[...] * (index + 1).astype(jnp.float32), jnp.ones(2)
    )
    expected = np.ones(2)
    for index, weight in enumerate(np.asarray(weights)):
        expected = expected * 2 + weight * (index + 1)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_a_parameter_names_every_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        parameter(Build(), (2, 3), ("embed",))
