"""The one table from logical axes to mesh axes."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jinfer.errors import ConfigError
from jinfer.mesh import MESH_AXES, make_mesh, named_sharding, partition_spec


def test_a_mesh_has_all_axes_whatever_its_size():
    for size in (1, 2, 8):
        mesh = make_mesh(size)
        assert mesh.axis_names == MESH_AXES
        assert dict(mesh.shape) == {axis: size if axis == "tensor" else 1 for axis in MESH_AXES}


def test_too_few_devices():
    with pytest.raises(ConfigError, match="tensor_parallel_size is 9 and 8 cpu device"):
        make_mesh(9)
    with pytest.raises(ConfigError, match="is 2 and 1"):
        make_mesh(2, jax.devices()[:1])


def test_axes_follow_the_table():
    assert partition_spec(("vocab", "embed")) == P("tensor", None)
    assert partition_spec(("kv_heads", None, "head_dim", "embed")) == P("tensor", None, None, None)
    assert partition_spec(("layers", "feed_forward", "embed")) == P(None, "tensor", None)


def test_what_the_devices_do_not_divide_is_replicated():
    mesh = make_mesh(8)
    assert partition_spec(("vocab", "embed"), (300, 64), mesh) == P(None, None)
    assert partition_spec(("vocab", "embed"), (304, 64), mesh) == P("tensor", None)
    assert named_sharding(mesh, ("vocab", "embed"), (304, 64)).spec == P("tensor", None)


def test_unknown_axes_and_collisions_are_errors():
    with pytest.raises(ValueError, match="'height' has no rule"):
        partition_spec(("height",))
    with pytest.raises(ValueError, match="two of them map to mesh axis 'tensor'"):
        partition_spec(("vocab", "heads"))
