"""The plain functions for research code: forward under jit, grad and vmap, against torch's autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jinfer import forward, load_params
from jinfer.mesh import make_mesh
from jinfer.models import llama
from tests.support.models import hf_logits, load_hf, make_llama, random_prompt, relative_error

TOKENS = np.asarray([random_prompt(i, 24) for i in range(3)], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Biases, GQA and a rotary scaling with a magnitude, so that each has a gradient to check."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    return make_llama(
        tmp_path_factory.mktemp("functional") / "model",
        seed=1,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=yarn,
    )


@pytest.fixture(scope="module")
def params(folder):
    return load_params(str(folder))


def loss_of(params, tokens):
    """Mean cross-entropy of the next token."""
    logprobs = jax.nn.log_softmax(forward(params, tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=2))


def hf_gradients(folder) -> tuple[float, dict[str, np.ndarray]]:
    model = load_hf(folder)
    model.zero_grad()
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def test_a_batch_is_its_sequences(folder, params):
    logits = jax.jit(forward)(params, jnp.asarray(TOKENS))
    assert logits.shape == (3, 24, 300)
    assert logits.dtype == jnp.float32
    for row, tokens in zip(np.asarray(logits), TOKENS, strict=True):
        assert relative_error(row, hf_logits(folder, tokens.tolist())) < 1e-4
    mapped = jax.vmap(lambda t: forward(params, t))(jnp.asarray(TOKENS))
    np.testing.assert_allclose(mapped, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_gradients_equal_those_of_torch(folder, loop):
    params = load_params(str(folder), layer_loop=loop)
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(params, jnp.asarray(TOKENS))
    expected_loss, by_name = hf_gradients(folder)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    for leaf in llama.FAMILY.weights.leaves(params.spec, make_mesh()):
        tensors = [by_name[name] for name, _ in leaf.sources]
        each = len(tensors) // max(leaf.layers, 1)
        layers = [leaf.build(tensors[i : i + each]) for i in range(0, len(tensors), each)]
        expected = np.stack(layers) if leaf.layers else layers[0]
        actual = np.asarray(gradients.arrays[leaf.path])
        assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max() + 1e-7, leaf.path


def test_parameters_are_a_pytree(params):
    doubled = jax.tree.map(lambda x: x * 2, params)
    assert doubled.spec == params.spec
    assert len(jax.tree.leaves(params)) == len(params.arrays)
    np.testing.assert_allclose(
        doubled.arrays["norm.weight"], 2 * np.asarray(params.arrays["norm.weight"]), rtol=1e-6
    )


@pytest.mark.parametrize("devices", [2, 4])
def test_sharded_parameters_give_the_same(folder, params, devices):
    sharded = load_params(str(folder), tensor_parallel_size=devices)
    assert len(sharded.arrays["head"].sharding.device_set) == devices
    actual = jax.jit(forward)(sharded, jnp.asarray(TOKENS))
    np.testing.assert_allclose(actual, forward(params, jnp.asarray(TOKENS)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_tokens_of_another_rank_are_refused(params, shape):
    with pytest.raises(ValueError, match=r"expected \[sequence\] or \[batch, sequence\]"):
        forward(params, jnp.zeros(shape, jnp.int32))
