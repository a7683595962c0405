"""Which step programs an engine has, and each of them lowered from shapes alone.

Nothing here needs a device to be there: a mesh over described devices compiles just as well (`tools.compile_check`).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jinfer.config import EngineConfig
from jinfer.kv_plan import GroupPlan, KVPlan, pool_shape
from jinfer.mesh import named_sharding
from jinfer.models.decoder import ModelSpec
from jinfer.models.loading import targets
from jinfer.packing import StepShape
from jinfer.slots import SlotState, slot_shapes
from jinfer.step import make_step
from pallas_kernels import native
from pallas_kernels import paged_attention as pa

# EFFORT_O0 to EFFORT_O3 in XLA's compiler options.
XLA_EFFORT = (9, 19, 29, 39)
NO_EMITTERS = {"xla_cpu_use_fusion_emitters": False}
REMEMBERED = 32  # programs of some 10 MB each

_remembered: dict[Any, Any] = {}  # the last used at the end

logger = logging.getLogger(__name__)


def buckets(low: int, high: int, growth: int = 2) -> list[int]:
    """`low` times powers of `growth`, and `high` itself."""
    sizes = []
    size = low
    while size < high:
        sizes.append(size)
        size *= growth
    return [*sizes, high]


def step_sizes(config: EngineConfig, *, is_cpu: bool) -> tuple[list[int], list[int]]:
    """(rows of the decode steps, tokens of the mixed steps) that are compiled.

    A CPU takes seconds to compile a program, and a server should start in under twenty: it gets fewer of them. There
    products cost by the row, so the widest interval is halved, where most steps of a busy engine fall.
    """
    most_rows, most_tokens = config.max_num_seqs, config.max_num_batched_tokens
    if not is_cpu:
        return buckets(1, most_rows), buckets(min(16, most_tokens), most_tokens)
    rows = {1, *buckets(min(4, most_rows), most_rows)}
    if most_rows >= 16:
        rows.add(3 * most_rows // 4)
    return sorted(rows), buckets(min(32, most_tokens), most_tokens, growth=4)


def compiler_options(level: int | None, *, is_cpu: bool) -> dict[str, Any] | None:
    """What `lowered.compile` is told for an optimization level from 0 to 3, or None for the platform's default."""
    if not is_cpu:
        return None if level is None else {"optimization_level": XLA_EFFORT[level]}
    # Measured on CPU: a step is no slower at level 1 than at XLA's default 3, and 0 to 1% slower without its fusion
    # emitters, since the products come from a library and the rest is bound by memory. A cold start takes 0.6 of the
    # time so.
    level = 1 if level is None else level
    options: dict[str, Any] = {"xla_backend_optimization_level": level}
    return options | NO_EMITTERS if level < 2 and _is_known(*NO_EMITTERS.items()) else options


@functools.cache
def _is_known(*options: tuple[str, Any]) -> bool:
    """XLA's options come and go with its versions, and it refuses a program that is given one it does not know."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=dict(options))
    except Exception as error:
        logger.info("XLA compiles without %s: %s", dict(options), error)
        return False
    return True


class StepPrograms:
    """The compile keys of one engine and the abstract arrays that its steps take.

    kv, slots: shape, dtype and sharding of the KV pools, one per page group, and of the slots.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, config: EngineConfig, kv_plan: KVPlan) -> None:
        self.spec, self.mesh, self.config, self.kv_plan = spec, mesh, config, kv_plan
        self.replicated = NamedSharding(mesh, P())
        self.is_cpu = mesh.devices.flat[0].platform == "cpu"
        if self.is_cpu and mesh.size == 1 and spec.build.dtype == jnp.float32 and native.load() is None:
            self.spec = replace(spec, build=replace(spec.build, native_rows=native.MAX_ROWS))
        self._row_buckets, self._token_buckets = step_sizes(config, is_cpu=self.is_cpu)
        self._shapes: dict[tuple[bool, int], StepShape] = {}
        self.kv = self._kv()  # a pool per page group
        self.slots: Any = self._slots()  # a SlotState of ShapeDtypeStructs

    def _kv(self) -> tuple[Any, ...]:
        return tuple(self._pool(group) for group in self.kv_plan.groups)

    def _pool(self, group: GroupPlan) -> Any:
        plan = self.kv_plan
        num_pages = len(group.layers) * group.pages
        shape = pool_shape(self.spec, group.kind, num_pages, plan.page_size, plan.implementation)
        specs = pa.kv_partition_spec("tensor", kv=shape, implementation=plan.implementation)

        def place(struct: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(place, shape, specs)

    def _slots(self) -> SlotState:
        shapes = slot_shapes(
            self.config.max_num_seqs,
            self.kv_plan.pages_per_slot,
            len(self.kv_plan.groups),
            self.spec.config.vocab_size,
        )
        history = named_sharding(self.mesh, (None, "vocab"), shapes.history.shape)

        def place(name: str, struct: Any) -> Any:
            sharding = history if name == "history" else self.replicated
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), struct)

        placed: dict[str, Any] = {name: place(name, struct) for name, struct in vars(shapes).items()}
        return SlotState(**placed)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pools on all devices together."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.kv))

    def shape_for(self, decode_only: bool, num_rows: int, num_tokens: int) -> StepShape:
        """The smallest shape that holds a batch of so many rows and tokens."""
        sizes = self._row_buckets if decode_only else self._token_buckets
        size = next(s for s in sizes if s >= (num_rows if decode_only else num_tokens))
        shape = self._shapes.get((decode_only, size))
        if shape is None:
            rows = size if decode_only else min(self.config.max_num_seqs, size)
            # A row begins at most one page unaligned; what prefix hits add beyond that goes another way.
            updates = rows if decode_only else rows + 2 * (size // self.kv_plan.page_size)
            shape = StepShape(
                size, rows, updates, self.config.max_num_seqs, decode_only, len(self.kv_plan.groups)
            )
            self._shapes[decode_only, size] = shape
        return shape

    def all_shapes(self) -> list[StepShape]:
        """Every shape, the slowest to compile first."""
        mixed = [self.shape_for(False, 0, n) for n in reversed(self._token_buckets)]
        return mixed + [self.shape_for(True, n, n) for n in reversed(self._row_buckets)]

    def lower(self, shape: StepShape) -> Any:
        """The jitted step of one shape, lowered: (arrays, kv, slots, packed) -> (kv, slots, StepOutput)."""
        jitted = jax.jit(
            make_step(self.spec, self.mesh, self.kv_plan, shape),
            donate_argnums=(1, 2),
            out_shardings=(
                jax.tree.map(lambda s: s.sharding, self.kv),
                jax.tree.map(lambda s: s.sharding, self.slots),
                self.replicated,
            ),
        )
        packed = jax.ShapeDtypeStruct((shape.size,), jnp.int32, sharding=self.replicated)
        return jitted.lower(targets(self.spec, self.mesh), self.kv, self.slots, packed)

    def compile(self, lowered: Any) -> Any:
        """The executable of a lowered step."""
        return lowered.compile(
            compiler_options=compiler_options(self.config.optimization_level, is_cpu=self.is_cpu)
        )

    def _key(self, shape: StepShape) -> Any:
        settings = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64  # pyright: ignore
        level = self.config.optimization_level
        return self.spec, self.mesh, self.kv_plan, shape, level, settings

    def recall(self, shape: StepShape) -> Any:
        """The executable that an engine of this process made before for the same step, or None.

        An engine that is made again, in a notebook or for another checkpoint of the same shape, neither traces nor loads
        its programs a second time.
        """
        key = self._key(shape)
        program = _remembered.pop(key, None)
        if program is not None:
            _remembered[key] = program
        return program

    def remember(self, shape: StepShape, program: Any) -> None:
        """Keeps an executable for the engines after this one, and drops the one that was not used for longest. Only on
        CPU: elsewhere it takes memory of the device, which the next model may need."""
        if not self.is_cpu:
            return
        _remembered[self._key(shape)] = program
        for key in list(_remembered)[:-REMEMBERED]:
            _remembered.pop(key, None)
