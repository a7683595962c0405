"""Random-weight Llama folders made by transformers, and what transformers computes with them: the oracle."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Models this small are computed faster by one thread than by several that wait for each other.
torch.set_num_threads(1)

END = "<|end|>"


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte (ids 0 to 255) and an end token (256)."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant: {% endif %}"


def write_tokenizer(folder: Path) -> None:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# Two KV heads: fewer than the devices of the widest mesh that tests use.
GROUPED: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def make_llama(
    folder: Path, *, seed: int = 0, scale: float = 0.12, stored: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Writes a tiny model folder. Every parameter is random, biases and norms too, so that each one matters."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    llama = LlamaConfig(**{**settings, **config})
    model = LlamaForCausalLM(llama)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@functools.lru_cache(maxsize=64)
def load_hf(folder: Path) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Generation goes on past an end token, as with ignore_eos; min_new_tokens would forbid it instead.
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def _fresh(folder: Path) -> Any:
    """The model with rotary angles as for a new sequence: dynamic scaling remembers the longest one it saw."""
    model = load_hf(folder)
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.long))
    return model


def hf_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32[S, V]."""
    with torch.no_grad():
        return _fresh(folder)(torch.tensor([list(tokens)])).logits[0].numpy()


def hf_greedy(folder: Path, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
    """`count` greedy tokens, and the float32[count, V] logits they were the largest of."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        result = _fresh(folder).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits).numpy()


def margin(logits: np.ndarray) -> float:
    """The smallest distance between the two largest logits of a row, as a share of the row's largest magnitude."""
    top = np.sort(logits, axis=-1)[..., -2:]
    return float(np.min((top[..., 1] - top[..., 0]) / np.abs(logits).max(-1)))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest deviation in a row as a share of the row's largest magnitude, over all rows."""
    return float(np.max(np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)))


def random_prompt(seed: int, length: int, vocab: int = 256) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()
