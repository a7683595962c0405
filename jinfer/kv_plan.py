"""Which KV pages there are: the groups of layers that share them, and how many each gets of what memory is left."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jinfer.cache.budget import Budget, Need
from jinfer.cache.groups import GroupSize
from jinfer.config import EngineConfig
from jinfer.errors import ConfigError
from jinfer.layers.attention import KVKind, replicated_kv_heads
from jinfer.models.decoder import ModelSpec
from pallas_kernels import paged_attention as pa

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 2 * 1024**3  # of the host's memory, unless kv_cache_memory_bytes says otherwise


@dataclass(frozen=True)
class GroupPlan:
    """Layers that keep the same per token and see equally far back: they share page ids, a pool and a table.

    kind: of its layers, its window None if that reaches over max_model_len. layers: in order.
    pages: per layer, the null page included. page_bytes: of one page in all its layers, on all devices together.
    """

    kind: KVKind
    layers: tuple[int, ...]
    pages: int
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def size(self) -> GroupSize:
        """The sizes that the scheduler works with."""
        return GroupSize(self.pages, self.kind.window, len(self.layers))


@dataclass(frozen=True)
class KVPlan:
    """The KV pools of one engine; groups in the order of their first layers.

    fraction: bytes that a sequence of max_model_len tokens holds, as a share of what full attention would hold.
    """

    groups: tuple[GroupPlan, ...]
    page_size: int
    implementation: str
    max_model_len: int
    fraction: float = 1.0

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def num_bytes(self) -> int:
        return sum(group.num_bytes for group in self.groups)

    def group_of(self, kind: KVKind) -> int:
        """The group of the layers of this kind."""
        wanted = _merged(kind, self.max_model_len)
        return next(i for i, group in enumerate(self.groups) if group.kind == wanted)

    def __str__(self) -> str:
        parts = [
            f"{len(group.layers)} layers "
            + (
                "with full attention"
                if group.kind.window is None
                else f"with a window of {group.kind.window}"
            )
            + f": {group.pages} pages, {group.num_bytes / 2**20:.1f} MiB"
            for group in self.groups
        ]
        return f"{'; '.join(parts)}; {self.fraction:.3f} of full attention at {self.max_model_len} tokens"


def _merged(kind: KVKind, max_model_len: int) -> KVKind:
    """The kind with a window that reaches over every sequence left out: such layers keep what full ones keep."""
    return kind._replace(window=None) if kind.window is not None and kind.window >= max_model_len else kind


def group_layers(spec: ModelSpec, max_model_len: int) -> dict[KVKind, tuple[int, ...]]:
    """The layers of each page group."""
    groups: dict[KVKind, tuple[int, ...]] = {}
    for kind, layers in spec.config.kv_kinds.items():
        merged = _merged(kind, max_model_len)
        groups[merged] = tuple(sorted((*groups.get(merged, ()), *layers)))
    return groups


def pool_shape(spec: ModelSpec, kind: KVKind, num_pages: int, page_size: int, implementation: str) -> Any:
    """The shape of a pool of `num_pages` pages, all layers counted."""
    heads = replicated_kv_heads(kind.num_kv_heads, spec.build.tensor_parallel)
    return pa.kv_shape(
        num_pages,
        page_size,
        heads,
        kind.head_dim,
        spec.build.dtype,
        shared_values=kind.shared_values,
        implementation=implementation,
    )


def make_plan(
    spec: ModelSpec, pages: Sequence[int], page_size: int, implementation: str, max_model_len: int
) -> KVPlan:
    """The plan with so many pages per group, in the order of `group_layers`."""
    groups = [
        GroupPlan(kind, layers, count, _page_bytes(spec, kind, len(layers), page_size, implementation))
        for (kind, layers), count in zip(group_layers(spec, max_model_len).items(), pages, strict=True)
    ]
    needs = [Need(group.kind.window, group.page_bytes) for group in groups]
    fraction = Budget(needs, page_size, 1, 1).fraction(max_model_len)
    return KVPlan(tuple(groups), page_size, implementation, max_model_len, fraction)


def _page_bytes(spec: ModelSpec, kind: KVKind, num_layers: int, page_size: int, implementation: str) -> int:
    shape = pool_shape(spec, kind, num_layers, page_size, implementation)
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in jax.tree.leaves(shape))


def full_plan(
    spec: ModelSpec, config: EngineConfig, page_size: int, implementation: str, max_model_len: int
) -> KVPlan:
    """Pages for `max_num_seqs` sequences of max_model_len tokens at once, whatever the memory."""
    budget = _budget(spec, config, page_size, implementation, max_model_len)
    return make_plan(spec, budget.all_slots(max_model_len), page_size, implementation, max_model_len)


def _budget(
    spec: ModelSpec, config: EngineConfig, page_size: int, implementation: str, max_model_len: int
) -> Budget:
    needs = [
        Need(kind.window, _page_bytes(spec, kind, len(layers), page_size, implementation))
        for kind, layers in group_layers(spec, max_model_len).items()
    ]
    # Of a sequence that ended two windows are worth keeping, the prompt's last and its own.
    num_cached = 2 * config.max_num_seqs if config.enable_prefix_caching else 0
    return Budget(needs, page_size, config.max_num_batched_tokens, config.max_num_seqs, num_cached)


def step_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """A generous guess of one step's temporaries per device: activations of the largest step, logits, sampling."""
    c, item = spec.config, jnp.dtype(spec.build.dtype).itemsize
    widest = 2 * c.intermediate_size + 8 * c.hidden_size + 4 * c.num_attention_heads * c.head_dim
    return config.max_num_batched_tokens * widest * item + config.max_num_seqs * c.vocab_size * 4 * 6


def _free_device_bytes(mesh: Mesh, config: EngineConfig, spec: ModelSpec) -> int | None:
    """Bytes that KV may take on the devices that share a layer; None where the device does not tell."""
    spare = []
    for device in mesh.devices.flat:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        budget = int(stats["bytes_limit"] * config.gpu_memory_utilization)
        spare.append(budget - stats["bytes_in_use"] - step_bytes(spec, config))
    # Every set of the `expert` axis keeps all KV.
    return min(spare) * mesh.shape["tensor"]


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
    budget = _budget(spec, config, size, config.attention_backend, wanted)
    pages, room = _pages(budget, mesh, config, spec, wanted)
    if room < wanted:
        if config.max_model_len is not None or room < 2:
            token_bytes = budget.bytes_of([1] * len(budget.needs)) / size
            raise ConfigError(
                f"max_model_len is {wanted} and the KV pages hold {max(room, 0)} tokens "
                f"({token_bytes / 1024:.1f} KiB each): lower max_model_len or raise "
                "kv_cache_memory_bytes or gpu_memory_utilization"
            )
        logger.warning(
            "max_model_len lowered from %d to %d: the KV pages hold no more; raise kv_cache_memory_bytes for longer ones",
            wanted,
            room,
        )
        return plan_kv(spec, mesh, replace(config, max_model_len=room))
    return make_plan(spec, pages, size, config.attention_backend, wanted)


def _pages(
    budget: Budget, mesh: Mesh, config: EngineConfig, spec: ModelSpec, wanted: int
) -> tuple[list[int], int]:
    """(pages per group, tokens that one sequence can have with them, at most `wanted`)."""
    # More than every slot at its longest is never used by running rows.
    most = budget.all_slots(wanted)
    override = config.num_gpu_blocks_override
    if override is not None:
        pages = [
            override if need.window is None else min(override, count)
            for need, count in zip(budget.needs, most, strict=True)
        ]
        return pages, budget.longest(pages, wanted)
    size = config.kv_cache_memory_bytes
    if size is None and mesh.devices.flat[0].platform != "cpu":
        size = _free_device_bytes(mesh, config, spec)
    if size is None:
        size = min(CPU_KV_BYTES, budget.bytes_of(most))
    room = budget.longest_of(size, wanted)
    return (budget.split(size, wanted) if room >= wanted else []), room
