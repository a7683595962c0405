"""Llama checkpoints with random weights: real shapes to measure speed on, where no trained model is at hand.

Plain numpy and safetensors write them, so torch is not needed. The tokenizer is byte-level BPE, and every entry of the
vocabulary beyond the 256 bytes is plain ASCII: whatever a model without training samples, each token is text at once,
so a streaming server has something to send at every token.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import string
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jinfer import ConfigError

PREFIX = "random:"
FORMAT = 1  # raised when the same shape gives other files, so that a kept folder is not taken for the new one
SPECIAL = ("<s>", "</s>", "<pad>")
BOS_ID, EOS_ID, PAD_ID = range(3)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class RandomLlama:
    """Shape of a Llama with tied embeddings, in Hugging Face's words."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, weights as [out, in]."""
        e, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, e)
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            yield f"{layer}.input_layernorm.weight", (e,)
            yield f"{layer}.self_attn.q_proj.weight", (q, e)
            yield f"{layer}.self_attn.k_proj.weight", (kv, e)
            yield f"{layer}.self_attn.v_proj.weight", (kv, e)
            yield f"{layer}.self_attn.o_proj.weight", (e, q)
            yield f"{layer}.post_attention_layernorm.weight", (e,)
            yield f"{layer}.mlp.gate_proj.weight", (f, e)
            yield f"{layer}.mlp.up_proj.weight", (f, e)
            yield f"{layer}.mlp.down_proj.weight", (e, f)
        yield "model.norm.weight", (e,)

    def hf_config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "dtype": "float32",
            "torch_dtype": "float32",
        }


SIZES = {
    "9m": RandomLlama(256, 896, 8, 8, 4, 6144),  # 8.7 million parameters
    "100m": RandomLlama(768, 2048, 12, 12, 4, 32768),  # 100.7 million
}


def resolve_random(model: str) -> str:
    """`random:100m` as a folder, made in the user's cache at first use; any other model as it is.

    Raises:
      ConfigError: no such size.
    """
    if not model.startswith(PREFIX):
        return model
    shape = shape_of(model.removeprefix(PREFIX))
    text = json.dumps([FORMAT, asdict(shape)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "jinfer" / "bench" / f"llama-{model.removeprefix(PREFIX)}-{digest}"
    if not (folder / "config.json").is_file():
        write_model(shape, folder)
    return str(folder)


def shape_of(size: str) -> RandomLlama:
    """The shape named `size`. Raises ConfigError if there is none."""
    if size not in SIZES:
        raise ConfigError(f"there is no random model {size!r}, expected one of {', '.join(SIZES)}")
    return SIZES[size]


def write_model(shape: RandomLlama, folder: Path, seed: int = 0) -> None:
    """Writes a whole model folder; it appears under its name only when complete.

    Raises:
      ConfigError: the folder exists and is not empty, or cannot be written.
    """
    from safetensors.numpy import save_file

    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        save_file(random_tensors(shape, seed), str(work / "model.safetensors"), metadata={"format": "pt"})
        write_json(work / "config.json", shape.hf_config())
        special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        write_json(work / "generation_config.json", {**special, "do_sample": False})
        write_tokenizer(shape, work)
        work.chmod(0o755)
        work.replace(folder)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def random_tensors(shape: RandomLlama, seed: int) -> dict[str, np.ndarray]:
    """float32 tensors by name.

    Matrices have a deviation of 1/sqrt(inputs) and embeddings are small: then the layers, not the last token's own
    embedding, decide the next token, and greedy output is not one token for ever.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for name, size in shape.tensors():
        if len(size) == 1:
            tensors[name] = np.ones(size, np.float32)
            continue
        deviation = 0.02 if "embed" in name else size[1] ** -0.5
        tensors[name] = random.standard_normal(size, np.float32) * np.float32(deviation)
    return tensors


def write_tokenizer(shape: RandomLlama, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE with exactly `vocab_size` entries.

    Raises:
      ConfigError: the vocabulary is smaller than the special tokens and the bytes.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = shape.vocab_size - len(SPECIAL) - len(alphabet)
    if room < 0:
        raise ConfigError(
            f"vocab_size is {shape.vocab_size}, expected at least {len(SPECIAL) + len(alphabet)}"
        )
    merges = list(itertools.islice(letter_merges(), room))
    words = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    if len(words) < shape.vocab_size:
        raise ConfigError(f"vocab_size is {shape.vocab_size}, expected at most {len(words)}")
    bpe = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    named = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": CHAT_TEMPLATE}
    write_json(
        folder / "tokenizer_config.json", {**fields, "model_max_length": shape.max_position_embeddings}
    )


def letter_merges() -> Iterator[tuple[str, str]]:
    """Merges that make all words of two, then three, then four small letters: 475,228 of them."""
    letters = string.ascii_lowercase
    pairs = [a + b for a in letters for b in letters]
    yield from itertools.product(letters, letters)
    yield from itertools.product(pairs, letters)
    yield from itertools.product(pairs, pairs)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
