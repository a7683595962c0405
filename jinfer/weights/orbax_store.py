"""Saves and restores loaded parameters with Orbax: no conversion at start, and each device reads its own
slices.

A folder holds `jinfer.json` (written last: a folder without it is incomplete), `orbax/` with the arrays,
and the config and tokenizer files of the model. Parameters are kept under their paths. A folder serves
under another mesh, dtype or layer loop than it was written with: what differs only in sharding or dtype is
restored directly, what differs in stacking or shape is rebuilt on the host, one leaf at a time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jinfer.errors import ModelError
from jinfer.weights.files import read_json_object, some
from jinfer.weights.load import Leaf, load_leaves

META_FILE = "jinfer.json"
ARRAYS = "orbax"
FORMAT = 1

# Orbax reads this much at once; without a limit the host holds the whole checkpoint beside the arrays.
CONCURRENT_GB = 2

# How `jinfer.layers.stack.LayerStack` names a parameter of layers f, f + s, f + 2 s, ..., and one of a single layer.
STACK = re.compile(r"(.*\.|)layer\.(\d+)_(\d+)\.(.*)")
LAYER = re.compile(r"(.*\.|)layers\.(\d+)\.(.*)")

Shape = tuple[int, ...]
# (path of one layer's parameter, saved shape, wanted shape) -> how to make the one from the other, None if impossible
Refit = Callable[[str, Shape, Shape], Callable[[np.ndarray], np.ndarray] | None]


def is_orbax_folder(folder: Path) -> bool:
    """True if `folder` was written by `save_orbax`, to the end."""
    return (folder / META_FILE).is_file()


def read_meta(folder: Path) -> dict[str, Any]:
    """What `save_orbax` was given as `meta`. Raises ModelError if it is missing, broken or of another version."""
    record = read_json_object(folder / META_FILE)
    if record.get("format") != FORMAT or not isinstance(record.get("meta"), dict):
        raise ModelError(
            f"{folder / META_FILE} has format {record.get('format')!r}, expected {FORMAT}: "
            "convert the model again with this version of jinfer"
        )
    return record["meta"]


def save_orbax(folder: Path, arrays: Mapping[str, jax.Array], meta: Mapping[str, Any]) -> None:
    """Writes arrays by path, each device its own slices, then `meta` (JSON) as the mark that all is written.

    Raises ModelError if the folder holds a checkpoint already, or cannot be written.
    """
    import orbax.checkpoint as ocp  # a second of imports that only orbax folders pay

    if (folder / ARRAYS).exists() or is_orbax_folder(folder):
        raise ModelError(f"{folder} holds a checkpoint already: remove it or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Compressed weights are barely smaller, and slower to write and to read.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=CONCURRENT_GB)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / ARRAYS).resolve(), args=ocp.args.PyTreeSave(dict(arrays)))
        if jax.process_index() == 0:
            record = {"format": FORMAT, "meta": dict(meta)}
            (folder / META_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}") from error


def restore_orbax(
    folder: Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    *,
    refit: Refit = lambda path, saved, wanted: None,
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Arrays by path with the shapes, dtypes and shardings of `targets`.

    A stack `a.layer.b` is made of saved layers `a.layers.0.b`, `a.layers.1.b` ..., and the other way round.
    Where one layer's shape differs, `refit` may say how to remake it.

    Raises:
      ModelError: the folder is incomplete or damaged, or a parameter is missing, left over or
        misshaped.
    """
    read_meta(folder)
    source = OrbaxSource(folder)
    try:
        origins = _origins(targets, source)
        direct = {
            path: target
            for path, target in targets.items()
            if origins[path].names == (path,) and source.shape(path) == tuple(target.shape)
        }
        # Sorted by what they are made of: each saved stack is then read once, whatever the order of the layers.
        others = sorted(targets.keys() - direct.keys(), key=lambda path: origins[path].names)
        leaves = [_leaf(path, targets[path], origins[path], source, refit) for path in others]
        built = load_leaves(leaves, source, ignored=lambda name: True, progress=progress)
        return built | source.restore(direct)
    finally:
        source.close()


class OrbaxSource:
    """The saved arrays as a `TensorSource`. The last array read is kept: a stack is read once for all its
    layers.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.folder = (folder / ARRAYS).resolve()
        self._ocp = ocp
        self._last: tuple[str, np.ndarray] | None = None
        self._checkpointer = ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(restore_concurrent_gb=CONCURRENT_GB)
        )
        try:
            self._saved = dict(self._checkpointer.metadata(self.folder).item_metadata.tree)  # type: ignore
            self._shapes = {name: tuple(told.shape) for name, told in self._saved.items()}
            self._dtypes = {name: np.dtype(told.dtype) for name, told in self._saved.items()}
        except Exception as error:  # the storage library's own errors have no common base
            self.close()
            raise self._damaged(error) from error

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> Shape:
        return self._known(self._shapes, name)

    def dtype(self, name: str) -> np.dtype:
        return self._known(self._dtypes, name)

    def read(self, name: str) -> np.ndarray:
        self.shape(name)
        if self._last is None or self._last[0] != name:
            self._last = None
            wanted = self._ocp.RestoreArgs(restore_type=np.ndarray)
            self._last = (name, np.asarray(self._restore({name: 0}, {name: wanted})[name]))
        return self._last[1]

    def release(self, name: str) -> None:
        """Nothing: the next `read` of another name drops the array."""

    def restore(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Saved arrays straight into their shardings; shapes must be the saved ones."""
        if not targets:
            return {}
        self._last = None
        placed = {path: _placed(target) for path, target in targets.items()}
        return self._restore(placed, self._ocp.checkpoint_utils.construct_restore_args(placed))

    def close(self) -> None:
        self._last = None
        self._checkpointer.close()

    def _restore(self, item: dict[str, Any], restore_args: dict[str, Any]) -> dict[str, Any]:
        args = self._ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        try:
            return self._checkpointer.restore(self.folder, args=args)
        except Exception as error:
            raise self._damaged(error) from error

    def _known(self, values: dict[str, Any], name: str) -> Any:
        if name not in values:
            raise ModelError(f"{self.folder} has no parameter {name!r}")
        return values[name]

    def _damaged(self, error: Exception) -> ModelError:
        return ModelError(
            f"{self.folder} cannot be read, it is incomplete or damaged: convert the model again "
            f"({type(error).__name__}: {str(error)[:300]})"
        )


def _placed(target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The target with a sharding: without one, orbax would ask for the devices that the array was saved from."""
    if target.sharding is not None:
        return target
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=device)


@dataclass(frozen=True)
class Origin:
    """The saved arrays that a parameter is made of: itself, its layers in order, or row `row` of a stack."""

    names: tuple[str, ...]
    row: int | None = None


def _origin(path: str, depth: int, saved: Mapping[str, Shape]) -> Origin | None:
    """None if nothing that was saved can make `path`. The names are those of `jinfer.layers.stack.LayerStack`."""
    if path in saved:
        return Origin((path,))
    if stack := STACK.fullmatch(path):
        first, step = int(stack[2]), int(stack[3])
        names = tuple(f"{stack[1]}layers.{i}.{stack[4]}" for i in range(first, first + step * depth, step))
        return Origin(names) if names and names[0] in saved else None
    if layer := LAYER.fullmatch(path):
        stacks = [Origin((name,), row) for name in saved if (row := _row_in(name, layer)) is not None]
        held = [origin for origin in stacks if (origin.row or 0) < saved[origin.names[0]][0]]
        return next(iter(held or stacks), None)
    return None


def _row_in(name: str, layer: re.Match[str]) -> int | None:
    """The row of the stacked parameter `name` where this layer's would be; None if it holds other layers."""
    stack = STACK.fullmatch(name)
    if stack is None or (stack[1], stack[4]) != (layer[1], layer[3]):
        return None
    row, between = divmod(int(layer[2]) - int(stack[2]), int(stack[3]))
    return None if between or row < 0 else row


def _origins(targets: Mapping[str, jax.ShapeDtypeStruct], source: OrbaxSource) -> dict[str, Origin]:
    """Where every parameter comes from. Raises ModelError if one has no origin, or a saved array no use."""
    saved = {name: source.shape(name) for name in source.names()}
    origins, missing = {}, []
    rows: Counter[str] = Counter()
    for path, target in targets.items():
        origin = _origin(path, target.shape[0] if target.shape else 0, saved)
        origins[path] = origin = origin or Origin((path,))
        missing += [name for name in origin.names if name not in saved]
        if origin.row is not None:
            rows[origin.names[0]] += 1
    unused = sorted(saved.keys() - {name for origin in origins.values() for name in origin.names})
    for name, wanted in rows.items():
        if wanted != source.shape(name)[0]:
            unused.append(f"{name} (a stack of {source.shape(name)[0]} layers where {wanted} are wanted)")
    for found, what in ((missing, "lacks"), (unused, "has unused")):
        if found:
            raise ModelError(
                f"{source.folder} {what} parameters: {some(found)}: config.json does not fit the arrays, "
                "convert the model again"
            )
    return origins


def _leaf(path: str, target: jax.ShapeDtypeStruct, origin: Origin, source: OrbaxSource, refit: Refit) -> Leaf:
    """How to rebuild a parameter that was saved in another shape or stacking."""
    gathered, row = origin.names != (path,) and origin.row is None, origin.row
    stacked = STACK.fullmatch(path) is not None
    saved, wanted = source.shape(origin.names[0]), tuple(target.shape)
    # The shapes of one layer.
    before = saved[1:] if row is not None or (stacked and not gathered) else saved
    after = wanted[1:] if stacked else wanted
    make = _same if before == after else refit(path, before, after)
    if make is None or (stacked and not gathered and saved[0] != wanted[0]):
        raise ModelError(
            f"parameter {path} has shape {saved} in {source.folder} and {wanted} is wanted: "
            "convert the model again with the options that it is served with"
        )

    def build(arrays: list[np.ndarray]) -> np.ndarray:
        if row is not None:
            return make(arrays[0][row])
        return np.stack([make(layer) for layer in arrays[0]]) if stacked and not gathered else make(arrays[0])

    return Leaf(
        path=path,
        shape=wanted,
        dtype=target.dtype,
        sources=tuple((name, source.shape(name)) for name in origin.names),
        build=build,
        sharding=target.sharding,
        layers=len(origin.names) if gathered else 0,
    )


def _same(array: np.ndarray) -> np.ndarray:
    return array
