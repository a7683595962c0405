"""Loading leaf by leaf: values, casts, shardings and stacks are right, and a wrong checkpoint is named first."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jinfer.errors import ModelError
from jinfer.weights.load import Leaf, check_leaves, load_leaves
from jinfer.weights.safetensors_source import SafetensorsSource, open_safetensors


def first(tensors: list[np.ndarray]) -> np.ndarray:
    return tensors[0]


def leaf(
    path: str, shape: tuple[int, ...], *names: str, dtype: Any = np.float32, build=first, **more
) -> Leaf:
    """A leaf whose sources (by default one tensor of its name) have the leaf's own shape."""
    return Leaf(path, shape, dtype, tuple((name, shape) for name in names or (path,)), build, **more)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))


@pytest.fixture
def opened(write_checkpoint):
    """Opens a checkpoint of given tensors, and closes it afterwards."""
    sources: list[SafetensorsSource] = []

    def open_(tensors: dict[str, np.ndarray], shards: int = 1) -> SafetensorsSource:
        sources.append(open_safetensors(write_checkpoint(tensors, shards)))
        return sources[-1]

    yield open_
    for source in sources:
        source.close()


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


FLOATS = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("stored", [*FLOATS, np.float64])
@pytest.mark.parametrize("wanted", FLOATS)
def test_casts_as_numpy_does(stored, wanted, opened):
    values = random(5, 7, dtype=stored)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-30, 3.0], stored)
    source = opened({"w": values, "special": special})
    loaded = load_leaves([leaf("w", (5, 7), dtype=wanted), leaf("special", (6,), dtype=wanted)], source)
    for name, expected in (("w", values), ("special", special)):
        assert loaded[name].dtype == wanted
        assert np.asarray(loaded[name]).tobytes() == expected.astype(wanted).tobytes()


def test_bfloat16_to_float32_is_exact_for_every_value(opened):
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    loaded = load_leaves([leaf("w", (2**16,))], opened({"w": every}))["w"]
    expected = every.astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(loaded), nan)
    np.testing.assert_array_equal(np.asarray(loaded)[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b")), None])
def test_every_device_gets_its_slice(spec, shards, mesh, opened):
    tensors = {f"l{i}": random(16, 8, dtype=ml_dtypes.bfloat16, seed=i) for i in range(5)}
    sharding = None if spec is None else NamedSharding(mesh, spec)
    loaded = load_leaves(
        [leaf(name, (16, 8), sharding=sharding) for name in tensors], opened(tensors, shards)
    )
    for name, values in tensors.items():
        assert sharding is None or loaded[name].sharding == sharding
        assert len(loaded[name].addressable_shards) == (1 if spec is None else 8)
        for shard in loaded[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, values[shard.index].astype(np.float32))


@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("b", "a"), P(None, None, "b"), None])
def test_stack_is_filled_layer_by_layer(spec, mesh, opened):
    tensors = {f"{i}.{part}": random(8, 4, seed=i) for i in range(4) for part in ("q", "k")}
    calls = []

    def fuse(parts: list[np.ndarray]) -> np.ndarray:
        calls.append(len(parts))
        return np.concatenate(parts)

    stack = Leaf(
        path="stack",
        shape=(4, 16, 4),
        dtype=np.float32,
        sources=tuple((f"{i}.{part}", (8, 4)) for i in range(4) for part in ("q", "k")),
        build=fuse,
        sharding=None if spec is None else NamedSharding(mesh, spec),
        layers=4,
    )
    loaded = load_leaves([stack], opened(tensors))["stack"]
    expected = np.stack([np.concatenate([tensors[f"{i}.q"], tensors[f"{i}.k"]]) for i in range(4)])
    np.testing.assert_array_equal(loaded, expected)
    assert calls == [2] * 4
    for shard in loaded.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])


def test_scalars_empty_arrays_and_transposes_load(mesh, opened):
    source = opened({"s": np.array(2.5, np.float32), "e": np.empty((0, 4), np.float32), "t": random(4, 8)})
    whole = NamedSharding(mesh, P())
    loaded = load_leaves(
        [
            leaf("s", (), sharding=whole),
            leaf("e", (0, 4)),
            Leaf("t", (8, 4), np.float32, (("t", (4, 8)),), lambda t: t[0].T, NamedSharding(mesh, P("b"))),
        ],
        source,
    )
    assert loaded["s"] == 2.5
    assert loaded["e"].shape == (0, 4)
    np.testing.assert_array_equal(loaded["t"], random(4, 8).T)


def test_arrays_outlive_the_file_and_may_be_donated(write_checkpoint):
    folder = write_checkpoint({"w": random(256, 256)})
    source = open_safetensors(folder)
    loaded = load_leaves([leaf("w", (256, 256))], source)
    source.close()
    (folder / "model.safetensors").unlink()
    kept = np.array(loaded["w"])
    added = jax.jit(lambda w: w + 1, donate_argnums=0)(loaded["w"])
    np.testing.assert_array_equal(kept, random(256, 256))
    np.testing.assert_array_equal(added, kept + 1)


def test_cpu_arrays_take_the_buffer_without_a_copy(mesh, opened, monkeypatch):
    made = []
    real = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[-1])
    loaded = load_leaves(
        [leaf("w", (64, 64), sharding=NamedSharding(mesh, P("b")))], opened({"w": random(64, 64)})
    )
    starts = {shard.data.unsafe_buffer_pointer() for shard in loaded["w"].addressable_shards}
    assert len(starts) == 4  # eight devices, four slices
    assert all(any(0 <= start - raw.ctypes.data < 64 for raw in made) for start in starts)


WEIGHTS = {"model.a.weight": (2, 3), "model.b.weight": (4,)}


@pytest.mark.parametrize(
    ("present", "problem"),
    [
        ({"model.a.weight": (2, 3)}, r"lacks 1 tensor\(s\): model.b.weight: .*config.json"),
        ({}, r"lacks 2 tensor\(s\): model.a.weight, model.b.weight"),
        (
            {"a.weight": (2, 3), "model.b.weight": (4,)},
            r"lacks 1 tensor\(s\): model.a.weight; the checkpoint has a.weight",
        ),
        (
            {"model.a.weight": (3, 2), "model.b.weight": (4,)},
            r"model.a.weight has shape \(3, 2\), expected \(2, 3\)",
        ),
        ({**WEIGHTS, "model.c.bias": (1,)}, r"1 tensor\(s\) that this model does not use: model.c.bias"),
        ({**WEIGHTS, **{f"x{i}": (1,) for i in range(50)}}, r"50 tensor\(s\) .*: x0, .* and 44 more"),
    ],
)
def test_wrong_checkpoint_is_named_before_anything_is_read(present, problem, opened, monkeypatch):
    source = opened({"other": random(1)} | {name: random(*shape) for name, shape in present.items()})
    monkeypatch.setattr(source, "read", lambda name: pytest.fail("a tensor was read"))
    with pytest.raises(ModelError, match=problem):
        load_leaves(
            [leaf(name, shape) for name, shape in WEIGHTS.items()],
            source,
            ignored=lambda name: name == "other",
        )


def test_quantized_weights_are_not_taken_for_plain_ones(opened):
    source = opened({"i": np.ones((2,), np.int32), "f": np.ones((2,), ml_dtypes.float8_e4m3fn)})
    for name in ("i", "f"):
        with pytest.raises(ModelError, match=f"{name}: has dtype .*quantized weights"):
            load_leaves([leaf(name, (2,))], source, ignored=lambda name: True)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_values_beyond_float16_are_an_error(stored, opened):
    source = opened({"big": np.array([[1.0, 1e6]], stored), "inf": np.array([[1.0, np.inf]], stored)})
    load_leaves([leaf("inf", (1, 2), dtype=np.float16)], source, ignored=lambda name: True)
    with pytest.raises(ModelError, match="big: has values beyond float16's range: use --dtype bfloat16"):
        load_leaves([leaf("big", (1, 2), dtype=np.float16)], source, ignored=lambda name: True)


def test_mistakes_in_a_plan_are_told(opened):
    source = opened({"w": random(2, 3)})
    with pytest.raises(ValueError, match="same path"):
        check_leaves([leaf("w", (2, 3)), leaf("w", (2, 3))], source)
    with pytest.raises(ValueError, match=r"build of leaf w returned shape \(3, 2\)"):
        load_leaves([leaf("w", (2, 3), build=lambda t: t[0].T)], source)
    with pytest.raises(ValueError, match="stacks 3 layers"):
        leaf("w", (2, 3), layers=3)


MEASURE = """
import re, sys
from pathlib import Path
from typing import Any
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jinfer.weights.load import Leaf, load_leaves
from jinfer.weights.safetensors_source import open_safetensors

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

folder, dtype, form = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
mesh = Mesh(np.array(jax.devices()), ("t",))
jnp.zeros((8, 8)).block_until_ready()
source = open_safetensors(Path(folder))
shape = source.shape("0.a")
pairs = sorted({int(name[:-2]) for name in source.names()})
def layer(i):
    return ((f"{i}.a", shape), (f"{i}.b", shape))
if form == "apart":
    sharding = NamedSharding(mesh, P(None, "t"))
    leaves = [Leaf(str(i), (2, *shape), jnp.dtype(dtype), layer(i), np.stack, sharding) for i in pairs]
else:
    sharding = NamedSharding(mesh, P(None, None, "t"))
    sources = tuple(s for i in pairs for s in layer(i))
    stack = (len(pairs), 2, *shape)
    leaves = [Leaf("w", stack, jnp.dtype(dtype), sources, np.stack, sharding, layers=len(pairs))]
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
arrays = load_leaves(leaves, source)
print(status("VmHWM") - before, sum(a.nbytes for a in arrays.values()))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize(("dtype", "form"), [("float32", "apart"), ("bfloat16", "stacked")])
def test_peak_memory_is_the_checkpoint_and_less_than_a_shard(dtype, form, write_checkpoint):
    rng = np.random.default_rng(0)
    rows, columns, layers = 1024, 4096, 12
    tensors = {
        f"{i}.{part}": rng.integers(0, 0x3F80, (rows, columns), np.uint16).view(ml_dtypes.bfloat16)
        for i in range(layers)
        for part in "ab"
    }
    folder = write_checkpoint(tensors, shards=4)
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(folder), dtype, form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size == sum(t.size for t in tensors.values()) * jnp.dtype(dtype).itemsize
    assert size < peak * 1.05  # the measure sees the arrays
    assert peak < size + shard


def test_many_long_names_are_compared_in_no_time(write_checkpoint):
    tensors = {f"layer.{i}.{'x' * 150}.weight": np.zeros(1, np.float32) for i in range(20_000)}
    source = open_safetensors(write_checkpoint(tensors))
    leaf = Leaf("w", (1,), np.float32, (("layer.1.y.weight", (1,)),), lambda t: t[0])
    start = time.process_time()
    with pytest.raises(ModelError, match="lacks 1 tensor"):
        check_leaves([leaf], source)
    assert time.process_time() - start < 2
    source.close()
