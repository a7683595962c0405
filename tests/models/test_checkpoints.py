"""Checkpoints that name or hold their tensors otherwise than the family's usual ones, against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jinfer import forward, load_params
from tests.support.models import hf_logits, make_model, random_prompt, relative_error

PROMPT = random_prompt(3, 11)


def rewrite(folder: Path, change: Any) -> Path:
    """Writes the folder's tensors again, as `change` makes them of what they were."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def check_equal(folder: Path) -> None:
    """The folder's logits are those of transformers."""
    actual = np.asarray(forward(load_params(str(folder), dtype="float32"), np.asarray(PROMPT)))
    assert relative_error(actual, hf_logits(folder, PROMPT)) < 1e-4


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_rotary_frequencies_are_not_read(model_type, tmp_path):
    frequencies = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(2)
    }
    check_equal(rewrite(make_model(model_type, tmp_path), lambda tensors: {**tensors, **frequencies}))
