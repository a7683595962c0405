"""How many pages each group of layers gets, from a model's config and the memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jinfer import ConfigError, kv_plan
from jinfer.config import EngineConfig
from jinfer.kv_plan import full_plan, group_layers, plan_kv, step_bytes
from jinfer.mesh import make_mesh
from jinfer.models.hf_config import read_config
from jinfer.models.loading import make_spec
from tests.support.engines import small_engine
from tests.support.models import make_llama

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 512, "block_size": 32, "dtype": "bfloat16"}


def plan(name, **options):
    engine = EngineConfig(model=name, **{**SIZES, **options})
    spec = make_spec(read_config(CONFIGS / name), engine, "cpu")
    return plan_kv(spec, make_mesh(), engine)


def test_one_group_gets_the_whole_budget():
    page = 32 * 2 * 8 * 128 * 2 * 32  # tokens, keys and values, heads, head size, bytes, layers
    made = plan("llama-3-8b", kv_cache_memory_bytes=100 * page + 99, max_model_len=1024)
    (group,) = made.groups
    assert (group.pages, group.page_bytes, group.num_bytes) == (100, page, 100 * page)
    assert (made.fraction, made.pages_per_slot, group.layers) == (1.0, 32, tuple(range(32)))


def test_a_windowed_model_on_the_same_budget_runs_more_and_longer():
    made = plan("gemma-3-27b", kv_cache_memory_bytes=8 * 2**30, max_model_len=32768)
    sliding, full = made.groups
    assert (sliding.kind.window, len(sliding.layers), len(full.layers)) == (1024, 52, 10)
    assert not set(sliding.layers) & set(full.layers)
    assert made.num_bytes <= 8 * 2**30
    assert made.fraction == pytest.approx((52 * 33 + 10 * 1024) / (62 * 1024))
    # One sequence of 32768 tokens takes 16 GiB where all layers keep everything.
    assert full.page_bytes + sliding.page_bytes > 8 * 2**30 / 1024
    assert full.pages > 1024
    assert made.group_of(sliding.kind) == 0
    assert made.group_of(sliding.kind._replace(window=None)) == 1
    assert "52 layers with a window of 1024" in str(made)


def test_tensor_parallel_devices_hold_the_pools_together():
    one = plan("gemma-3-27b", kv_cache_memory_bytes=8 * 2**30, max_model_len=32768)
    four = plan("gemma-3-27b", kv_cache_memory_bytes=8 * 2**30, max_model_len=32768, tensor_parallel_size=4)
    assert [group.pages for group in one.groups] == [group.pages for group in four.groups]
    # Fewer KV heads than devices are kept several times over.
    wide = plan("gemma-2-9b", kv_cache_memory_bytes=2**30, max_model_len=512, tensor_parallel_size=16)
    narrow = plan("gemma-2-9b", kv_cache_memory_bytes=2**30, max_model_len=512)
    assert wide.groups[0].page_bytes == 2 * narrow.groups[0].page_bytes


@pytest.mark.parametrize(("length", "groups"), [(1024, 1), (1025, 2)])
def test_a_window_over_the_whole_length_is_no_window(length, groups):
    engine = EngineConfig(model="x", **SIZES)
    spec = make_spec(read_config(CONFIGS / "gemma-3-27b"), engine, "cpu")
    assert len(group_layers(spec, length)) == len(full_plan(spec, engine, 32, "xla", length).groups) == groups
    assert sum(len(layers) for layers in group_layers(spec, length).values()) == 62


def test_too_little_memory_lowers_the_length_or_is_refused(caplog):
    budget = 2**30
    made = plan("gemma-3-27b", kv_cache_memory_bytes=budget)
    assert f"lowered from 131072 to {made.max_model_len}" in caplog.text
    assert made.num_bytes <= budget
    # The same length asked for is granted, one page more is not.
    plan("gemma-3-27b", kv_cache_memory_bytes=budget, max_model_len=made.max_model_len)
    with pytest.raises(ConfigError, match=f"the KV pages hold {made.max_model_len} tokens"):
        plan("gemma-3-27b", kv_cache_memory_bytes=budget, max_model_len=made.max_model_len + 32)


def test_an_override_is_for_what_keeps_everything():
    made = plan("gemma-3-27b", num_gpu_blocks_override=5000, max_model_len=32768)
    sliding, full = made.groups
    assert full.pages == 5000
    # Twelve windows of 33 pages, of which running sequences use four; a chunk of 16 pages, and the null page.
    assert sliding.pages == 12 * 33 + 16 + 1
    with pytest.raises(ConfigError, match="the KV pages hold 64 tokens"):
        plan("gemma-3-27b", num_gpu_blocks_override=3, max_model_len=32768)


def test_on_a_cpu_every_slot_has_its_sequence_within_a_limit():
    made = plan("gpt-oss-20b", max_model_len=512, enable_prefix_caching=False)
    sliding, full = made.groups
    assert (sliding.kind.window, full.pages) == (128, 4 * 16 + 1)
    assert sliding.pages == 4 * 5 + (16 - 5) + 1


def test_on_a_cpu_a_long_model_gets_the_length_that_the_limit_holds(caplog):
    """A token of this model takes 256 KiB of KV in float32, so 2 GiB hold 8,192 of them, the null page among them."""
    made = plan("llama-3-8b", dtype="float32", max_num_seqs=1)
    assert (made.max_model_len, made.num_bytes) == (8192 - 32, 2 * 2**30)
    assert "max_model_len lowered from 8192 to 8160" in caplog.text
    with pytest.raises(ConfigError, match="max_model_len is 8192 and the KV pages hold 8160 tokens"):
        plan("llama-3-8b", dtype="float32", max_num_seqs=1, max_model_len=8192)
    assert plan("llama-3-8b", dtype="float32", kv_cache_memory_bytes=3 * 2**30).max_model_len == 8192


def test_a_model_of_any_length_starts_on_a_cpu(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kv_plan, "CPU_KV_BYTES", 2**20)
    folder = make_llama(tmp_path / "long", max_position_embeddings=2**31 - 1)
    engine = small_engine(folder, max_model_len=None)
    assert engine.max_model_len < 3000
    assert f"max_model_len lowered from 2147483647 to {engine.max_model_len}" in caplog.text


def test_free_memory_is_counted_for_one_set_of_devices():
    """Of 8 devices 4 share a layer, and the other 4 keep the same KV again; the fullest of them decides."""

    def device(used: int) -> SimpleNamespace:
        return SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000 * 2**20, "bytes_in_use": used})

    mesh: Any = SimpleNamespace(
        devices=np.array([device(5), device(10 * 2**20), *[device(0)] * 6]), shape={"tensor": 4}
    )
    config = EngineConfig(gpu_memory_utilization=0.5, max_num_seqs=1, max_num_batched_tokens=16)
    spec = make_spec(read_config(CONFIGS / "llama-3-8b"), config, "gpu")
    assert kv_plan._free_device_bytes(mesh, config, spec) == 4 * (490 * 2**20 - step_bytes(spec, config))
