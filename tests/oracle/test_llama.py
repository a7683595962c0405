"""Every shape of Llama against transformers: logits, log-probabilities, and 64 greedy tokens from the engine.

Weights are random, and the seeds are chosen so that no greedy choice is a near tie: the margin is checked, at more
than a hundred times the deviation that float32 leaves between the two.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jinfer import forward, load_params
from tests.support.engines import greedy, run, served_engine, small_engine
from tests.support.models import hf_greedy, hf_logits, make_llama, margin, random_prompt, relative_error

TOLERANCE = 1e-4
CLEAR_MARGIN = 1.5e-4


def rope(kind: str, theta: float = 10000.0, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def shape(heads: int, kv_heads: int, hidden: int, head_dim: int | None = None) -> dict[str, Any]:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    return sizes if head_dim is None else {**sizes, "head_dim": head_dim}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
BETAS = {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 64}

CASES: dict[str, dict[str, Any]] = {
    "heads_1_to_1": {"seed": 11, **shape(4, 4, 48)},
    "heads_4_to_1": {"seed": 9, **shape(8, 2, 64)},
    "heads_7_to_1": {"seed": 3, **shape(7, 1, 70)},
    "heads_14_to_2": {"seed": 2, **shape(14, 2, 56, 8)},
    "heads_8_to_1": {"seed": 2, **shape(8, 1, 80)},
    "heads_16_to_2": {"seed": 7, **shape(16, 2, 64, 10)},
    "one_head": {"seed": 11, **shape(1, 1, 36)},
    "head_size_24": {"seed": 5, **shape(4, 2, 96), "vocab_size": 499},
    "head_size_36": {"seed": 6, **shape(2, 1, 72), "intermediate_size": 77},
    "head_size_40": {"seed": 11, **shape(4, 1, 32, 40)},
    "head_size_80": {"seed": 1, **shape(2, 2, 48, 80)},
    "linear_2": {"seed": 0, **rope("linear", factor=2.0)},
    "linear_5": {"seed": 1, **shape(4, 1, 40), **rope("linear", 500000.0, factor=5.0)},
    # Both prompts' outputs pass the original length, the longer prompt begins beyond that of the second model.
    "dynamic_2": {"seed": 10, **rope("dynamic", factor=2.0), "max_position_embeddings": 96},
    "dynamic_8": {
        "seed": 7,
        **shape(2, 1, 72),
        **rope("dynamic", factor=8.0),
        "max_position_embeddings": 32,
    },
    "llama3_8": {"seed": 7, **rope("llama3", 500000.0, factor=8.0, **LLAMA3)},
    "llama3_32": {
        "seed": 8,
        **shape(7, 1, 56),
        **rope(
            "llama3",
            factor=32.0,
            low_freq_factor=2.0,
            high_freq_factor=16.0,
            original_max_position_embeddings=40,
        ),
    },
    "yarn_4": {"seed": 5, **rope("yarn", factor=4.0, original_max_position_embeddings=128)},
    "yarn_attention_factor": {
        "seed": 8,
        **rope("yarn", factor=8.0, attention_factor=0.7, original_max_position_embeddings=64),
    },
    "yarn_mscale": {
        "seed": 8,
        **rope("yarn", factor=16.0, mscale=0.9, mscale_all_dim=1.4, original_max_position_embeddings=32),
    },
    "yarn_betas": {"seed": 2, **shape(2, 1, 80), **rope("yarn", 100000.0, factor=8.0, **BETAS)},
    "attention_bias": {"seed": 1, "attention_bias": True},
    "mlp_bias": {"seed": 5, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "tied": {"seed": 0, "scale": 0.2, "tie_word_embeddings": True},
    "everything": {
        "seed": 5,
        "scale": 0.2,
        **shape(14, 2, 84, 24),
        **rope("yarn", factor=4.0, original_max_position_embeddings=128),
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-3,
    },
}
PROMPTS = {"short": random_prompt(21, 21), "long": random_prompt(70, 70)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("llamas")
    return {name: make_llama(root / name, **case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_forward_gives_the_logits_of_transformers(folders, name):
    tokens = random_prompt(5, 140)
    expected = hf_logits(folders[name], tokens)
    actual = jax.jit(forward)(load_params(str(folders[name])), jnp.asarray(tokens))
    assert relative_error(np.asarray(actual), expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_engine_gives_the_tokens_and_logprobs_of_transformers(folders, name):
    """Prompts are longer than a step's budget, so they are computed in chunks; pages are smaller still."""
    # One row at a time keeps it at two programs, compiled side by side. Every other model scans its layers, and two of
    # eight are compiled as they are served.
    number = list(CASES).index(name)
    loop = "scan" if number % 2 else "unroll"
    make = served_engine if number % 8 < 2 else small_engine
    engine = make(folders[name], max_num_seqs=1, max_model_len=160, layer_loop=loop, warmup=True)
    params = greedy(64, logprobs=4, prompt_logprobs=0)
    outputs = run(engine, {which: (prompt, params) for which, prompt in PROMPTS.items()})
    for which, prompt in PROMPTS.items():
        tokens, logits = hf_greedy(folders[name], prompt, 64)
        assert margin(logits) > CLEAR_MARGIN, "a near tie: choose another seed"
        assert outputs[which].token_ids == tokens
        _check_output_logprobs(outputs[which].logprobs, logits)
        _check_prompt_logprobs(outputs[which].prompt_logprobs, prompt, hf_logits(folders[name], prompt))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _check_output_logprobs(entries, logits: np.ndarray) -> None:
    expected = log_softmax(logits)
    for entry, row in zip(entries, expected, strict=True):
        best = np.argsort(-row)[:4]
        assert entry.token_id == best[0]
        assert entry.rank == 1
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([p for _, p in entry.top], row[best], rtol=1e-4, atol=1e-5)


def _check_prompt_logprobs(entries, prompt: list[int], logits: np.ndarray) -> None:
    expected = log_softmax(logits)
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for i in range(1, len(prompt)):
        row = expected[i - 1]
        assert entries[i].token_id == prompt[i]
        assert entries[i].logprob == pytest.approx(row[prompt[i]], rel=1e-4, abs=1e-5)
        # Two tokens may be as close to each other as the two systems are.
        low, high = (1 + np.sum(row > row[prompt[i]] + slack) for slack in (1e-5, -1e-5))
        assert low <= entries[i].rank <= high
        assert entries[i].top == ()


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_configs_in_the_old_spelling(tmp_path, kind):
    folder = make_llama(tmp_path, seed=3, max_position_embeddings=64)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": kind, "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = random_prompt(6, 120)
    actual = forward(load_params(str(folder)), jnp.asarray(tokens))
    assert relative_error(np.asarray(actual), hf_logits(folder, tokens)) < TOLERANCE


def test_weights_kept_as_bfloat16_are_computed_in_float32(tmp_path):
    folder = make_llama(tmp_path, seed=4, stored=torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    tokens = random_prompt(7, 60)
    actual = forward(load_params(str(folder)), jnp.asarray(tokens))
    assert relative_error(np.asarray(actual), hf_logits(folder, tokens)) < TOLERANCE
