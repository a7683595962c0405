"""Embeddings and log-likelihoods of families unlike Llama, on one device or on two, against transformers."""

from typing import Any

import numpy as np
import pytest
import torch

from jinfer import LLM
from tests.support.engines import SMALL, check_idle
from tests.support.models import make_model, random_prompt, reference

PROMPTS = [random_prompt(600 + n, n) for n in (1, 17, 70)]
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    # Norms around 1, scaled embeddings, windows of less than the prompt: two page groups.
    "gemma3_text": {
        "head_dim": 12,
        "num_hidden_layers": 3,
        "layer_types": WINDOWS,
        "sliding_window": 19,
    },
    # Layer norms with biases, a head with a bias.
    "phi": {"hidden_size": 48, "num_attention_heads": 4, "partial_rotary_factor": 0.5},
    # Sinks and experts.
    "gpt_oss": {
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "layer_types": WINDOWS,
        "sliding_window": 21,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # Latent attention.
    "deepseek_v2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
}


@pytest.mark.parametrize(
    ("family", "devices"), [("gemma3_text", 2), ("phi", 1), ("gpt_oss", 1), ("deepseek_v2", 2)]
)
def test_vectors_and_scores_are_those_of_transformers(family, devices, tmp_path):
    folder = make_model(family, tmp_path / "model", **FAMILIES[family])
    model = reference(folder).model
    llm = LLM(str(folder), **SMALL, tensor_parallel_size=devices)
    vectors = {kind: llm.embed(PROMPTS, pooling=kind, normalize=False) for kind in ("last", "mean")}
    scores = llm.score(PROMPTS[1:])
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            output = model(torch.tensor([prompt]), output_hidden_states=True)
        states = output.hidden_states[-1][0].double().numpy()
        for kind, expected in (("last", states[-1]), ("mean", states.mean(0))):
            error = np.abs(vectors[kind][i].embedding - expected).max()
            assert error < 1e-4 * np.abs(expected).max(), (kind, len(prompt))
        if i:
            table = output.logits[0].float().log_softmax(-1).numpy()
            expected = table[np.arange(len(prompt) - 1), prompt[1:]]
            np.testing.assert_allclose(scores[i - 1].logprobs, expected, atol=1e-4)
    check_idle(llm.engine)
