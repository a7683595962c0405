"""Several layers in one pool: updated in place, unrolled or scanned, on one device or many."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import paged_attention as pa
from tests.support.ragged import Row, Shape, make_step

LAYERS = 3
SHAPES = [
    Shape(layers=LAYERS, heads=8, kv_heads=4, head_dim=16, num_tokens=40),
    Shape(layers=LAYERS, heads=8, kv_heads=4, head_dim=16, num_tokens=6),
]
IDS = ["mixed", "decode"]


def step_of(shape: Shape, implementation: str, loop: str, layers: int = LAYERS):
    """A step of several layers, where each layer's keys come from the layer before, as in a model."""

    def layer(x, kv, plan, offset):
        k, v = x[:, ::2] * 0.5, x[:, 1::2]
        kv = pa.write_kv(kv, k, v, plan, page_offset=offset)
        return x + pa.attend(x, kv, plan, page_offset=offset, scale=shape.scale), kv

    def unrolled(x, kv, batch):
        plan = pa.prepare(batch, kv, shape.num_tokens, implementation=implementation)
        for index in range(layers):
            x, kv = layer(x, kv, plan, index * shape.pages_per_layer)
        return x, kv

    def scanned(x, kv, batch):
        plan = pa.prepare(batch, kv, shape.num_tokens, implementation=implementation)
        offsets = jnp.arange(layers, dtype=jnp.int32) * shape.pages_per_layer
        (x, kv), _ = lax.scan(lambda carry, offset: (layer(*carry, plan, offset), None), (x, kv), offsets)
        return x, kv

    return {"unrolled": unrolled, "scanned": scanned}[loop]


def ragged(shape: Shape):
    chunks = [Row(9, 9), Row(20, 50)] if shape.num_tokens > shape.num_rows else []
    return make_step(shape, [Row(1, 17), Row(1, 96), Row(1, 8)], chunks)


@pytest.fixture(scope="module", params=SHAPES, ids=IDS)
def case(request):
    step = ragged(request.param)
    output, kv = jax.jit(step_of(request.param, "reference", "unrolled"))(step.q, step.kv, step.batch)
    return step, np.asarray(output), np.asarray(kv)


def check(case, output, kv) -> None:
    step, wanted, wanted_kv = case
    live = int(step.batch.num_tokens)
    np.testing.assert_allclose(np.asarray(output)[:live], wanted[:live], atol=2e-5, rtol=2e-5)
    owned = step.owned()
    for index in range(LAYERS):
        pages = slice(index * step.shape.pages_per_layer, (index + 1) * step.shape.pages_per_layer)
        mask = np.broadcast_to(owned[:, None, None, :], wanted_kv[pages].shape[:-1])
        np.testing.assert_allclose(np.asarray(kv)[pages][mask], wanted_kv[pages][mask], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("loop", ["unrolled", "scanned"])
def test_layers_share_one_pool(case, loop):
    step = case[0]
    run = jax.jit(step_of(step.shape, "xla", loop))
    check(case, *run(step.q, step.kv, step.batch))


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("loop", ["unrolled", "scanned"])
def test_a_donated_pool_is_updated_in_place(shape, loop):
    step = ragged(shape)
    pool = pa.kv_shape(LAYERS * 4096, shape.page_size, shape.kv_heads, shape.head_dim, "float32")
    run = jax.jit(step_of(shape, "xla", loop), donate_argnums=1)
    memory = run.lower(step.q, pool, step.batch).compile().memory_analysis()
    assert memory is not None
    kv_bytes = pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes == kv_bytes
    assert memory.temp_size_in_bytes < kv_bytes / 50


@pytest.mark.parametrize("loop", ["unrolled", "scanned"])
@pytest.mark.parametrize("devices", [2, 4])
def test_each_device_serves_its_own_heads(case, loop, devices):
    step = case[0]
    mesh = Mesh(np.array(jax.devices()[:devices]), ("tensor",))
    heads, pool = P(None, "tensor"), pa.kv_partition_spec("tensor")
    run = jax.shard_map(
        step_of(step.shape, "xla", loop),
        mesh=mesh,
        in_specs=(heads, pool, P()),
        out_specs=(heads, pool),
        check_vma=False,
    )
    kv = jax.device_put(step.kv, NamedSharding(mesh, pool))
    check(case, *jax.jit(run)(step.q, kv, step.batch))


def test_layers_of_an_unrolled_step_share_their_kernels():
    """What differs between layers stays out of the kernels, so that the compiler makes each of them once."""

    def distinct_kernels(layers: int) -> tuple[int, int]:
        step = ragged(SHAPES[0])
        run = jax.jit(step_of(step.shape, "xla", "unrolled", layers))
        text = run.lower(step.q, step.kv, step.batch).compile().as_text() or ""
        kernels = re.findall(r"^%?fused_computation[^{]*\{.*?^\}", text, re.MULTILINE | re.DOTALL)
        # Without names, numbers of instructions and where they came from.
        plain = [re.sub(r"metadata=\{[^}]*\}|%[\w.-]+|\w+\.\d+", "", kernel) for kernel in kernels]
        return len(set(plain)), len(plain)

    (few, few_all), (many, many_all) = distinct_kernels(1), distinct_kernels(3)
    assert many_all > 2 * few_all
    assert many - few < (many_all - few_all) / 4
