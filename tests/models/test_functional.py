"""The plain functions for research code: forward under jit, grad and vmap, against torch's autograd."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jinfer import LLM, forward, load_params
from jinfer.mesh import make_mesh
from jinfer.models import llama
from tests.support.engines import SMALL
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


REFUSED: dict[str, Any] = {
    "a number": (5, r"shape \(\): expected \[sequence\] or \[batch, sequence\]"),
    "three dimensions": (np.zeros((2, 3, 4), int), r"expected \[sequence\] or \[batch, sequence\]"),
    "an empty sequence": ([], r"shape \(0,\): expected at least one token"),
    "empty sequences": (np.zeros((2, 0), int), "expected at least one token"),
    "no sequences": (jnp.zeros((0, 3), jnp.int32), "expected at least one token"),
    "fractions": (jnp.asarray([1.0, 2.0]), "dtype float32: expected integers"),
    "truth values": ([True, False], "dtype bool: expected integers"),
    "text": ("ab", "expected"),
    "unequal rows": ([[1], [1, 2]], "cannot be made an array"),
    "beyond the vocabulary": ([1, 300], "token id 300, expected integers from 0 to 299"),
    "negative": (jnp.asarray([[3, -1]]), "token id -1, expected integers from 0 to 299"),
    "beyond int32": (np.asarray([2**32 + 1]), "token id 4294967297"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sequence_of_tokens_is_refused(params, case):
    tokens, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        forward(params, tokens)


def test_shape_and_dtype_are_looked_at_under_jit_too(params):
    for tokens, message in ((jnp.ones(3), "dtype float32"), (jnp.ones((1, 1, 1), jnp.int32), "expected")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(forward, params, tokens)
    assert jax.eval_shape(forward, params, jnp.asarray([300])).shape == (1, 300)


SETTINGS: dict[str, Any] = {
    "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
    "no transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "64 bits": lambda: jax.enable_x64(True),
    "no NaN": lambda: jax.debug_nans(True),
    "no leaks": jax.checking_leaks,
}


@pytest.fixture(scope="module")
def plain(params):
    return forward(params, jnp.asarray(TOKENS[:1, :4]))


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_runs_under_strict_settings(params, plain, name):
    tokens = jnp.asarray(TOKENS[:1, :4])
    with SETTINGS[name]():
        logits = (
            jax.jit(lambda p, t: forward(p, t))(params, tokens)
            if "leaks" in name
            else forward(params, tokens)
        )
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-4)


def test_gradients_need_no_promotion_of_ranks(params):
    with jax.numpy_rank_promotion("raise"):
        shapes = jax.eval_shape(jax.grad(loss_of), params, jnp.asarray(TOKENS))
    assert shapes.arrays["norm.weight"].shape == (48,)


def test_bfloat16_is_as_near_to_the_engine_as_the_docstring_says():
    """Softmax weights are float32 in both; where they were rounded in one alone, 0.22 was between them."""
    llm = LLM("tiny", **{**SMALL, "dtype": "bfloat16"})
    params, prompt = load_params("tiny", dtype="bfloat16"), random_prompt(0, 60, 250)
    (output,) = llm.score([prompt])
    for compute, most, mean in ((forward, 0.06, 0.006), (jax.jit(forward), 0.25, 0.06)):
        logprobs = np.asarray(jax.nn.log_softmax(compute(params, jnp.asarray(prompt))))
        found = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
        gap = np.abs(found - np.asarray(output.logprobs))
        assert gap.max() < most
        assert gap.mean() < mean
