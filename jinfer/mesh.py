"""One table maps logical axes to mesh axes, for parameters, activations and KV pages alike.

The mesh has five axes; those that are not used have size 1, so a single device runs the same code.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jinfer.errors import ConfigError

MESH_AXES = ("data", "stage", "expert", "seq", "tensor")

# None: replicated. Every logical axis that a parameter or activation declares must stand here.
RULES: dict[str, str | None] = {
    "layers": None,
    "tokens": None,
    "embed": None,
    "head_dim": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
    "experts": "expert",
    "experts_over_tensor": "tensor",
}


def make_mesh(tensor: int = 1, devices: Sequence[jax.Device] | None = None, *, expert: int = 1) -> Mesh:
    """A mesh of the first `tensor * expert` devices: `tensor` share each layer, `expert` such sets part its experts.

    Raises:
      ConfigError: fewer devices than that.
    """
    found = list(devices) if devices is not None else jax.devices()
    if tensor * expert > len(found):
        raise ConfigError(
            f"tensor_parallel_size is {tensor}{f', expert_parallel_size {expert}' if expert > 1 else ''} and "
            f"{len(found)} {found[0].platform} device(s) are there: "
            "lower it, or on CPU set it before jax starts so that virtual devices can be made"
        )
    shape = abstract_mesh(tensor, expert).axis_sizes
    return Mesh(np.asarray(found[: tensor * expert]).reshape(shape), MESH_AXES)


def abstract_mesh(tensor: int = 1, expert: int = 1) -> AbstractMesh:
    """The shape of such a mesh, for `shard_map` in code that does not know the devices."""
    sizes = {"tensor": tensor, "expert": expert}
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Mesh | AbstractMesh | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these logical axes (None: replicated).

    With `shape` and `mesh`, a dimension that the mesh axis does not divide is replicated.

    Raises:
      ValueError: an axis without a rule, or two dimensions that want the same mesh axis.
    """
    names: list[str | None] = []
    for i, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule: add it to jinfer.mesh.RULES")
        name = RULES[axis] if axis is not None else None
        if name is not None and name in names:
            raise ValueError(f"logical axes {tuple(axes)}: two of them map to mesh axis {name!r}")
        if name is not None and shape is not None and mesh is not None and shape[i] % mesh.shape[name]:
            name = None
        names.append(name)
    return PartitionSpec(*names)


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
    """The sharding on `mesh` of an array whose dimensions carry these logical axes."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh))
