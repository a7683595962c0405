"""Writes a trained network as a Hugging Face folder, and reads such a folder back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
from safetensors.flax import load_file, save_file

from tools.tiny.model import Params, TinyConfig, parameter_shapes
from tools.tiny.tokenizer import BOS_ID, END_ID, PAD_ID


def export(folder: Path, config: TinyConfig, params: Params, tokenizer_folder: Path, dtype: str) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files to `folder`.

    Args:
      dtype: "bfloat16" or "float32", the type that weights are rounded to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    fields = {**config.to_hf(), **special, "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({**special, "do_sample": False}, indent=2) + "\n"
    )
    rounded = {name: params[name].astype(jnp.dtype(dtype)) for name in parameter_shapes(config)}
    save_file(rounded, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner alone
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, folder / name)


def load(folder: Path) -> tuple[TinyConfig, Params]:
    """Reads a folder that `export` wrote; the parameters come back as float32.

    Raises ValueError when a tensor is missing, extra or of another shape than config.json asks for.
    """
    config = TinyConfig.from_hf(json.loads((folder / "config.json").read_text()))
    params = {
        name: value.astype(jnp.float32) for name, value in load_file(folder / "model.safetensors").items()
    }
    expected = parameter_shapes(config)
    found = {name: value.shape for name, value in params.items()}
    if found != expected:
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        raise ValueError(
            f"{folder}: tensors do not fit config.json: {', '.join(wrong[:5])}: export the model again"
        )
    return config, params
