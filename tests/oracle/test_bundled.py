"""The bundled model against transformers: logits, and 64 greedy tokens on chat prompts."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from jinfer import LLM, forward, load_params
from jinfer.weights.hub import resolve_model
from tests.support.engines import check_idle, greedy
from tests.support.models import hf_greedy, hf_logits, margin, relative_error

CHATS = [
    [{"role": "user", "content": "Tell me a story about a cat."}],
    [{"role": "user", "content": "What is 27 + 58?"}],
    [
        {"role": "user", "content": "The code word is maple. Remember it."},
        {"role": "assistant", "content": "I will remember it."},
        {"role": "user", "content": "What is the code word?"},
    ],
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."}],
]


@pytest.fixture(scope="module")
def folder():
    return resolve_model("tiny")


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in CHATS
    ]


def test_logits(folder, prompts):
    params = load_params("tiny", dtype="float32")
    for prompt in prompts[:2]:
        actual = np.asarray(forward(params, jnp.asarray(prompt)))
        assert relative_error(actual, hf_logits(folder, prompt)) < 1e-4


def test_greedy_tokens_of_chats(folder, prompts):
    llm = LLM("tiny", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=512, warmup=False)
    outputs = llm.chat(CHATS, greedy(64))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.prompt_token_ids) == prompt
        tokens, logits = hf_greedy(folder, prompt, 64)
        assert margin(logits) > 1e-5, "a near tie: choose another prompt"
        assert output.token_ids == tokens
    check_idle(llm.engine)


def test_the_draft_model_has_the_same_tokenizer(folder):
    draft = resolve_model("tiny-draft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (draft / name).read_bytes() == (folder / name).read_bytes()
