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
from transformers import AutoConfig, AutoModelForCausalLM

from tools.verify_model.reference import Reference
from tools.verify_model.reference import margin as margin
from tools.verify_model.reference import relative_error as relative_error

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


def make_llama(folder: Path, **config: Any) -> Path:
    """Writes a tiny Llama folder; see `make_model`."""
    return make_model("llama", folder, **config)


def make_model(
    model_type: str,
    folder: Path,
    *,
    seed: int = 0,
    scale: float = 0.12,
    stored: torch.dtype = torch.float32,
    **config: Any,
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
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "llama":
        settings["rms_norm_eps"] = 1e-5
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**settings, **config}), attn_implementation="eager"
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            is_norm = "norm" in name and not name.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_norm else scale * noise)
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved:  # numbers that were learned without a gradient
                buffer.copy_(scale * torch.randn(buffer.shape, generator=random))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@functools.lru_cache(maxsize=64)
def reference(folder: Path) -> Reference:
    """transformers' model of a folder."""
    found = Reference(folder)
    # Models this small are computed faster by one thread than by several that wait for each other.
    torch.set_num_threads(1)
    return found


def load_hf(folder: Path) -> Any:
    return reference(folder).model


def hf_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """float32[S, V]."""
    return reference(folder).logits(tokens)


def hf_greedy(folder: Path, prompt: Sequence[int], count: int) -> tuple[list[int], np.ndarray]:
    """`count` greedy tokens, and the float32[count, V] logits they were the largest of."""
    return reference(folder).greedy(prompt, count)


def random_prompt(seed: int, length: int, vocab: int = 256) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()
