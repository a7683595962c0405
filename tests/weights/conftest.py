"""Checkpoints of random values, written to a folder."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors as `shards` safetensors files with an index, or as a single one; returns the folder."""

    def write(tensors: Tensors, shards: int = 1, folder: Path = tmp_path / "model") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        home = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
        for name in names:
            save_file({t: v for t, v in tensors.items() if home[t] == name}, folder / name)
        index = {"metadata": {"total_size": 0}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write
