"""How many KV pages there are: what the device has left, or on CPU what a flag says."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jinfer.config import EngineConfig
from jinfer.errors import ConfigError
from jinfer.layers.attention import replicated_kv_heads
from jinfer.models.decoder import ModelSpec
from pallas_kernels import paged_attention as pa

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVPlan:
    """The KV pool of one engine."""

    pages: int  # per layer, the null page included
    page_size: int
    implementation: str
    max_model_len: int

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_model_len // self.page_size)


CPU_KV_BYTES = 2 * 1024**3  # of the host's memory, unless the flag asks for more


def page_bytes(spec: ModelSpec, page_size: int, tensor_parallel: int, implementation: str) -> int:
    """Bytes of one page in all layers, on all devices together."""
    heads = replicated_kv_heads(spec.config.num_key_value_heads, tensor_parallel)
    shape = pa.kv_shape(
        spec.config.num_hidden_layers,
        page_size,
        heads,
        spec.config.head_dim,
        spec.build.dtype,
        implementation=implementation,
    )
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in jax.tree.leaves(shape))


def step_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """A generous guess of one step's temporaries per device: activations of the largest step, logits, sampling."""
    c, item = spec.config, jnp.dtype(spec.build.dtype).itemsize
    widest = 2 * c.intermediate_size + 8 * c.hidden_size + 4 * c.num_attention_heads * c.head_dim
    return config.max_num_batched_tokens * widest * item + config.max_num_seqs * c.vocab_size * 4 * 6


def _free_device_bytes(mesh: Mesh, config: EngineConfig, spec: ModelSpec) -> int | None:
    """Bytes that KV may take on all devices of the mesh together; None where the device does not tell."""
    spare = []
    for device in mesh.devices.flat:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        budget = int(stats["bytes_limit"] * config.gpu_memory_utilization)
        spare.append(budget - stats["bytes_in_use"] - step_bytes(spec, config))
    return min(spare) * len(spare)


def plan_kv(spec: ModelSpec, mesh: Mesh, config: EngineConfig) -> KVPlan:
    """The pool that the configuration, the model and the device's memory allow.

    Raises:
      ConfigError: not even one sequence fits, or max_model_len is more than the model or the memory can hold.
    """
    limit = spec.config.max_position_embeddings
    stretch = [rotary.factor for rotary in spec.config.rotaries if rotary.kind == "dynamic"]
    if stretch and config.max_model_len:
        limit = max(limit, int(limit * min(stretch)))
    wanted = config.max_model_len or limit
    if wanted > limit:
        raise ConfigError(f"max_model_len is {wanted}, the model knows positions up to {limit}: lower it")
    platform = mesh.devices.flat[0].platform
    # Half of a sequence's last page is empty on average: at 190 tokens small pages keep that to 2 percent. On CPU
    # they cost nothing measurable; on an accelerator a page should be worth a transfer of its own.
    size = config.block_size or (8 if platform == "cpu" else 32)
    per_slot = math.ceil(wanted / size)
    most = (
        config.max_num_seqs * per_slot + 1
    )  # more than every slot at its longest is never used by running rows
    bytes_per_page = page_bytes(spec, size, config.tensor_parallel_size, config.attention_backend)
    pages = config.num_gpu_blocks_override
    if pages is None:
        budget = config.kv_cache_memory_bytes
        if budget is None and platform != "cpu":
            budget = _free_device_bytes(mesh, config, spec)
        if budget is None:
            pages = min(max(CPU_KV_BYTES // bytes_per_page, per_slot + 1), most)
        else:
            pages = budget // bytes_per_page
    room = (pages - 1) * size
    if room < wanted:
        if config.max_model_len is not None or room < 2:
            raise ConfigError(
                f"max_model_len is {wanted} and the KV pages hold {max(room, 0)} tokens "
                f"({bytes_per_page / size / 1024:.1f} KiB each): lower max_model_len or raise "
                "kv_cache_memory_bytes or gpu_memory_utilization"
            )
        logger.warning("max_model_len lowered from %d to %d: the KV pages hold no more", wanted, room)
        wanted = room
    return KVPlan(pages, size, config.attention_backend, wanted)
