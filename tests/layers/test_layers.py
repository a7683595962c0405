"""The small layers against their formulas, in float64 or in torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

from jinfer.layers.attention import KVKind, LayerIndex, causal_attention
from jinfer.layers.linear import Linear, embed, project
from jinfer.layers.mlp import ACTIVATIONS, MLPSpec
from jinfer.layers.norm import NormSpec
from jinfer.layers.parameter import Build, parameter
from jinfer.layers.stack import LayerStack, Segment, is_stacked, layers_of, segments_of

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
    for by_product in (False, True):
        rows = embed(table, jnp.asarray([6, 0, 6]), by_product=by_product)
        np.testing.assert_array_equal(rows, np.asarray(table)[[6, 0, 6]])


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norm(eps):
    layer = filled(NormSpec(eps=eps).make(Build(), (16,)))
    x = array(4, 16)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * np.asarray(layer.weight[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)


def test_norm_with_an_offset_over_several_dimensions():
    layer = filled(NormSpec(eps=1e-3, offset=1.0, wide=True).make(Build(), (3, 8)))
    x = array(4, 3, 8)
    wide, weight = np.asarray(x, np.float64), np.asarray(layer.weight[...])
    expected = wide / np.sqrt((wide**2).mean((1, 2), keepdims=True) + 1e-3) * (weight + 1)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)


def test_norms_round_where_they_say():
    """In bfloat16: the product with the weight before the rounding, or after it."""
    x = array(64, 16, dtype=jnp.bfloat16)
    results = []
    for wide in (False, True):
        layer = filled(NormSpec(wide=wide).make(Build(dtype=jnp.float32), (16,)))
        weight = jnp.linspace(0.5, 1.5, 16).astype(jnp.bfloat16)
        layer.weight = layer.weight.replace(weight)
        results.append(np.asarray(layer(x), np.float32))
        unit = np.asarray(x, np.float32)
        unit = unit / np.sqrt((unit**2).mean(-1, keepdims=True) + 1e-6)
        exact = unit * np.asarray(weight, np.float32)
        rounded = np.asarray(jnp.asarray(unit).astype(jnp.bfloat16) * weight, np.float32)
        expected = np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32) if wide else rounded
        assert (results[-1] == expected).mean() > 0.98
    assert (results[0] != results[1]).mean() > 0.1


@pytest.mark.parametrize("shape", [(16,), (2, 8)])
def test_layer_norm(shape):
    layer = filled(NormSpec("layer", eps=1e-2).make(Build(), shape))
    x = array(4, *shape)
    parts = (torch.tensor(np.asarray(p[...])) for p in (layer.weight, layer.bias))
    expected = torch.nn.functional.layer_norm(torch.tensor(np.asarray(x)), shape, *parts, eps=1e-2)
    np.testing.assert_allclose(layer(x), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_feed_forward_without_a_gate():
    layer = filled(MLPSpec(6, "relu", gated=False, bias=True).make(Build(), 4))
    x = array(5, 4)
    up = np.asarray(x) @ np.asarray(layer.up.weight[...]).T + np.asarray(layer.up.bias[...])
    expected = np.maximum(up, 0) @ np.asarray(layer.down.weight[...]).T + np.asarray(layer.down.bias[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_norm_of_small_numbers_in_half_precision():
    """Squares of bfloat16 inputs are summed in float32."""
    layer: Any = NormSpec(eps=1e-12).make(Build(dtype=jnp.bfloat16), (64,))
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


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_causal_attention_with_its_options(window, soft_cap, with_sinks):
    q, k, v, sinks = array(2, 9, 6, 4), array(2, 9, 2, 4), array(2, 9, 2, 4), array(6)
    actual = causal_attention(
        q, k, v, 0.5, window=window, soft_cap=soft_cap, sinks=sinks if with_sinks else None
    )
    expected = np.zeros(q.shape)
    for b, i, h in np.ndindex(2, 9, 6):
        first = 0 if window is None else max(0, i + 1 - window)
        keys, values = (np.asarray(t)[b, first : i + 1, h // 3] for t in (k, v))
        logits = 0.5 * keys @ np.asarray(q)[b, i, h]
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits)
        total = weights.sum() + (np.exp(float(sinks[h])) if with_sinks else 0)
        expected[b, i, h] = weights @ values / total
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


ALIKE, WINDOWED = "aaa", "wwfwwfwwf"


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("specs", [ALIKE, "d" + WINDOWED + "w", "ffffww", "abc", "a"])
def test_stack_runs_its_layers_in_order(scan, specs):
    class Layer(nnx.Module):
        def __init__(self, build: Build, factor: int) -> None:
            self.weight = parameter(build, (2,), (None,))
            self.factor = factor

    kinds = [KVKind(1, 2, 8 if spec == "w" else None) for spec in specs]
    stack: Any = LayerStack(Build(), specs, lambda b, s: Layer(b, ord(s) % 5), kinds=kinds, scan=scan)
    weights = np.asarray(array(len(specs), 2))
    graph, state = nnx.split(stack)
    flat = []
    for path, param in nnx.to_flat_state(state):
        shape = param.get_value().shape
        layers, name = layers_of("stack." + ".".join(map(str, path)), shape)
        assert (name, is_stacked(".".join(map(str, path)))) == ("weight", len(shape) == 2)
        values = weights[list(layers)]
        flat.append((path, param.replace(jnp.asarray(values if len(shape) == 2 else values[0]))))
    stack = nnx.merge(graph, nnx.from_flat_state(flat))

    def body(layer: Any, index: LayerIndex, x: jax.Array) -> jax.Array:
        place = index.overall * 10 + index.in_kind + 1
        return x * 1.5 + layer.weight[...] * place.astype(jnp.float32) + layer.factor

    expected = np.ones(2)
    for index, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
        place = index * 10 + kinds[:index].count(kinds[index]) + 1
        expected = expected * 1.5 + weight * place + ord(spec) % 5
    np.testing.assert_allclose(stack(body, jnp.ones(2)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (ALIKE, [(0, 1, 3)]),
        (WINDOWED, [(0, 3, 3)]),
        ("d" + WINDOWED, [(0, 1, 1), (1, 3, 3)]),
        (WINDOWED + "w", [(0, 3, 3), (9, 1, 1)]),
        ("wwwwwf" * 10 + "ww", [(0, 6, 10), (60, 1, 2)]),
        ("ffffww", [(0, 1, 4), (4, 1, 2)]),
        ("abc", [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ("", []),
    ],
)
def test_segments_are_the_repetitions(specs, expected):
    assert segments_of(specs) == [Segment(*parts) for parts in expected]


def test_a_parameter_names_every_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        parameter(Build(), (2, 3), ("embed",))
