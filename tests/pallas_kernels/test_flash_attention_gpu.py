"""Dense attention's GPU kernel in interpret mode, with race detection, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ImplementationError, gpu_parts
from pallas_kernels.flash_attention import attend, gpu
from pallas_kernels.gpu_tiles import TileConfig, tile_config
from pallas_kernels.paged_attention.gpu_config import decode_config
from tests.support.gpu_interpreter import gpu_interpreted

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal, three heads to one": ((2, 90, 3, 1, 64), {}),
    "window, cap, sinks": ((1, 150, 2, 2, 64), {"sliding_window": 70, "soft_cap": 3.0, "sinks": True}),
    "both ways, window": ((2, 100, 2, 1, 80), {"causal": False, "sliding_window": 30}),
}


def arrays(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> list[jax.Array]:
    random = np.random.default_rng(7)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name, monkeypatch):
    monkeypatch.setattr(gpu, "tile_config", lambda head_dim: TileConfig(64, 2, 2))
    (batch, length, heads, kv_heads, head_dim), options = CASES[name]
    q, k, v = arrays(batch, length, heads, kv_heads, head_dim)
    options = {**options, "scale": head_dim**-0.5}
    if options.pop("sinks", False):
        options["sinks"] = jnp.linspace(-1.0, 2.0, heads)
    lengths = jnp.asarray([length - 7, 0][:batch], jnp.int32)
    with gpu_interpreted():
        output = np.asarray(attend(q, k, v, lengths=lengths, implementation="gpu", **options), np.float32)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    wanted = np.asarray(attend(*wide, lengths=lengths, implementation="reference", **options))
    for row, live in enumerate(lengths):
        np.testing.assert_allclose(output[row, :live], wanted[row, :live], atol=1e-2, rtol=1e-2)
    assert np.isfinite(output).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 8, 2, 1, 64), jnp.float32, "bfloat16"),
        ((1, 8, 2, 1, 72), jnp.bfloat16, "head sizes"),
        ((1, 8, 65, 1, 64), jnp.bfloat16, "at most 64"),
        ((1, 8, 2, 1, 64), jnp.bfloat16, "Hopper"),
    ],
)
def test_refuses_what_it_cannot_serve(shape, dtype, reason):
    q, k, v = (x.astype(dtype) for x in arrays(*shape))
    with pytest.raises(ImplementationError, match=reason):
        attend(q, k, v, scale=0.125, implementation="gpu")


def test_the_table_of_a_device_goes_before_the_heuristic(monkeypatch, tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"NVIDIA H200": {"tiles": {"128": {"stages": 3}}, "decode": {"64": {"stages": 6}}}}')
    monkeypatch.setattr(gpu_parts, "TABLE", table)
    monkeypatch.setattr(gpu_parts, "target_kind", lambda: "NVIDIA H200")
    assert tile_config(128).stages == 3
    assert tile_config(64).stages == 2
    assert decode_config(16, 64).stages == 6
    monkeypatch.setattr(gpu_parts, "target_kind", lambda: "NVIDIA H100 80GB HBM3")
    assert tile_config(128).stages == 2
