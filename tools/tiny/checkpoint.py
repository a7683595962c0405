"""Training checkpoints: one .npz of plain arrays (no pickle) and a JSON note inside it, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np


def save(path: Path, state: Any, note: dict[str, Any]) -> None:
    """Writes a pytree of arrays and a JSON-able note to `path`; a crash leaves the earlier file whole."""
    arrays = {f"leaf{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    arrays["note"] = np.asarray(json.dumps(note))
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(partial, path)


def load(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save` wrote into the structure of `like`.

    Raises ValueError when the file holds another structure or other shapes.
    """
    leaves, structure = jax.tree.flatten(like)
    with np.load(path, allow_pickle=False) as file:
        found = [file[f"leaf{i:05d}"] for i in range(len(file.files) - 1)]
        note = json.loads(str(file["note"]))
    shapes = [np.shape(leaf) for leaf in leaves]
    if [array.shape for array in found] != shapes:
        raise ValueError(
            f"checkpoint {path} does not fit this model ({len(found)} arrays, expected {len(shapes)} or other "
            "shapes): train into another folder, or give the settings the checkpoint was made with"
        )
    return jax.tree.unflatten(structure, [jax.numpy.asarray(array) for array in found]), note
