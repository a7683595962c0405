"""The only room that turns a Batch into arrays and calls jit.

Every step program is compiled before the engine is ready and kept as a compiled executable; one that is missing
later is compiled on the spot and counted in `recompiles`, which must stay 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jinfer.config import EngineConfig
from jinfer.errors import ModelError
from jinfer.kv_plan import KVPlan
from jinfer.mesh import named_sharding
from jinfer.models.decoder import Params
from jinfer.models.loading import LoadedModel, targets
from jinfer.packing import StepShape, pack
from jinfer.request import TokenLogprobs
from jinfer.sampling.features import needs_tables
from jinfer.sampling.sample import Logprobs
from jinfer.schedule.batch import Batch
from jinfer.slots import SlotState, load_tables, slot_shapes, slot_tables
from jinfer.step import KVLayout, StepOutput, make_step
from pallas_kernels import paged_attention as pa

logger = logging.getLogger(__name__)

SMALLEST_MIXED = 16


@dataclass
class StepHandle:
    """A dispatched step. Reading blocks until the device is done with it."""

    batch: Batch
    output: StepOutput

    def tokens(self) -> list[int]:
        return np.asarray(self.output.tokens)[: len(self.batch.rows)].tolist()

    def logprobs(self) -> Logprobs:
        return jax.tree.map(np.asarray, self.output.logprobs)

    def prompt_logprobs(self) -> Logprobs | None:
        return jax.tree.map(np.asarray, self.output.prompt)


def token_logprobs(table: Logprobs, row: int, token: int, count: int) -> TokenLogprobs:
    """One position of a host-side table as the API gives it."""
    top = tuple(
        (int(i), float(p))
        for i, p in zip(table.top_ids[row, :count], table.top[row, :count], strict=True)
        if p != -np.inf
    )
    return TokenLogprobs(token, float(table.chosen[row]), int(table.rank[row]), top)


def buckets(low: int, high: int, growth: int = 2) -> list[int]:
    """`low` times powers of `growth`, and `high` itself."""
    sizes = []
    size = low
    while size < high:
        sizes.append(size)
        size *= growth
    return [*sizes, high]


class Runner:
    """Owns parameters, KV pages and slots on device."""

    def __init__(self, model: LoadedModel, config: EngineConfig, kv: KVPlan) -> None:
        self.mesh, self.spec, self.kv_plan, self.config = model.mesh, model.spec, kv, config
        self.params: dict[str, Any] = dict(model.params.arrays)
        self._is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.recompiles = 0
        self.host_seconds = 0.0  # spent in pack and dispatch
        self._replicated = NamedSharding(self.mesh, P())
        self._layout = KVLayout(kv.pages, kv.page_size, kv.implementation)
        # A CPU compiles slowly, and pays less for a padded prompt chunk than for a start that takes longer.
        growth = 4 if self._is_cpu else 2
        self._row_buckets = buckets(1, config.max_num_seqs)
        self._token_buckets = buckets(
            min(SMALLEST_MIXED, config.max_num_batched_tokens), config.max_num_batched_tokens, growth
        )
        self._programs: dict[StepShape, Any] = {}
        self._shapes: dict[tuple[bool, int], StepShape] = {}
        self._abstract_kv = self._kv_shapes()
        self._abstract_slots = self._slot_shapes()
        self.kv = self._zeros(self._abstract_kv)
        self.slots: SlotState = self._zeros(self._abstract_slots)
        self._load_tables = jax.jit(
            load_tables,
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda x: x.sharding, self._abstract_slots),
        )
        self._write_pages = jax.jit(
            _write_pages, donate_argnums=0, out_shardings=self._abstract_slots.page_table.sharding
        )

    # Shapes and memory

    @property
    def kv_bytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self._abstract_kv))

    def _kv_shapes(self) -> Any:
        config, plan = self.spec.config, self.kv_plan
        shape = pa.kv_shape(
            config.num_hidden_layers * plan.pages,
            plan.page_size,
            max(config.num_key_value_heads, self.config.tensor_parallel_size),
            config.head_dim,
            self.spec.build.dtype,
            implementation=plan.implementation,
        )
        specs = pa.kv_partition_spec("tensor", kv=shape, implementation=plan.implementation)
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(self.mesh, p)),
            shape,
            specs,
        )

    def _slot_shapes(self) -> Any:
        vocab = self.spec.config.vocab_size
        shapes = slot_shapes(self.config.max_num_seqs, self.kv_plan.pages_per_slot, vocab)
        history = named_sharding(self.mesh, (None, "vocab"), shapes.history.shape)
        return SlotState(
            **{
                name: jax.ShapeDtypeStruct(
                    s.shape, s.dtype, sharding=history if name == "history" else self._replicated
                )
                for name, s in vars(shapes).items()
            }
        )

    def _zeros(self, abstract: Any) -> Any:
        shardings = jax.tree.map(lambda s: s.sharding, abstract)
        make = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract), out_shardings=shardings
        )
        return make()

    # Compiling

    def shape_for(self, decode_only: bool, num_rows: int, num_tokens: int) -> StepShape:
        """The smallest compiled shape that holds the batch."""
        sizes = self._row_buckets if decode_only else self._token_buckets
        size = next(s for s in sizes if s >= (num_rows if decode_only else num_tokens))
        shape = self._shapes.get((decode_only, size))
        if shape is None:
            rows = size if decode_only else min(self.config.max_num_seqs, size)
            # A row begins at most one page unaligned; what prefix hits add beyond that goes another way.
            updates = rows if decode_only else rows + 2 * (size // self.kv_plan.page_size)
            shape = StepShape(size, rows, updates, self.config.max_num_seqs, decode_only)
            self._shapes[decode_only, size] = shape
        return shape

    def all_shapes(self) -> list[StepShape]:
        decode = [self.shape_for(True, n, n) for n in self._row_buckets]
        return decode + [self.shape_for(False, 0, n) for n in self._token_buckets]

    def lower(self, shape: StepShape) -> Any:
        """The step of one shape, lowered for this runner's mesh."""
        step = make_step(self.spec, self.mesh, self._layout, shape)
        packed = jax.ShapeDtypeStruct((shape.size,), jnp.int32, sharding=self._replicated)
        jitted = jax.jit(
            step,
            donate_argnums=(1, 2),
            out_shardings=(
                jax.tree.map(lambda s: s.sharding, self._abstract_kv),
                jax.tree.map(lambda s: s.sharding, self._abstract_slots),
                self._replicated,
            ),
        )
        return jitted.lower(targets(self.spec, self.mesh), self._abstract_kv, self._abstract_slots, packed)

    def warmup(self) -> float:
        """Compiles every step; returns the seconds it took."""
        start = time.monotonic()
        missing = [s for s in self.all_shapes() if s not in self._programs]
        # Tracing holds the interpreter's lock, compiling does not: the pool compiles what is traced so far.
        with ThreadPoolExecutor(max_workers=4) as pool:
            futures = [(s, pool.submit(self._compile, self.lower(s))) for s in missing]
            for shape, future in futures:
                self._programs[shape] = future.result()
        self.slots = self._load_tables(self.slots, jnp.int32(0), self._empty_tables())
        table = self._write_pages(self.slots.page_table, *self._page_entries([]))
        self.slots = _with_table(self.slots, table)
        jax.block_until_ready(self.slots)
        return time.monotonic() - start

    def _compile(self, lowered: Any) -> Any:
        # Measured on CPU: level 1 compiles a quarter faster than the default 3 and its steps are no slower, since
        # the products come from a library and the rest is bound by memory.
        return lowered.compile(
            compiler_options={"xla_backend_optimization_level": 1} if self._is_cpu else None
        )

    def _program(self, shape: StepShape) -> Any:
        program = self._programs.get(shape)
        if program is None:
            if self.config.warmup:
                self.recompiles += 1
                logger.warning("compiling step %s while serving: this is a bug, please report it", shape)
            program = self._programs[shape] = self._compile(self.lower(shape))
        return program

    # Running

    def dispatch(self, batch: Batch) -> StepHandle:
        """Starts one step and the copy of its tokens to the host; returns at once."""
        shape = self.shape_for(batch.decode_only, len(batch.rows), batch.num_tokens)
        for request in batch.admitted:
            if needs_tables(request.params):
                self._upload_tables(request)
        packed, spilled = pack(batch, shape)
        if spilled:
            self._spill_pages(spilled)
        program = self._program(shape)
        self.kv, self.slots, output = program(self.params, self.kv, self.slots, packed)
        if not self._is_cpu:
            output.tokens.copy_to_host_async()
        return StepHandle(batch, output)

    def _upload_tables(self, request: Any) -> None:
        tables = slot_tables(request, self.spec.config.vocab_size)
        values = (tables.history, tables.bias_ids, tables.bias, tables.end_ids)
        self.slots = self._load_tables(self.slots, np.int32(request.slot), values)

    def _empty_tables(self) -> Any:
        state = self._abstract_slots
        names = (state.history, state.bias_ids, state.bias, state.end_ids)
        return tuple(np.zeros(s.shape[1:], s.dtype) for s in names)

    def _page_entries(self, entries: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, ...]:
        """(slots, indices, pages), each of the fixed length that `_write_pages` is compiled for."""
        size = self.kv_plan.pages_per_slot
        columns = np.zeros((3, size), np.int32)
        columns[0] = self.config.max_num_seqs  # the trash slot
        if entries:
            columns[:, : len(entries)] = np.asarray(entries, np.int32).T
        return tuple(columns)

    def _spill_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Long prefix hits bring more pages than the packed array has room for."""
        size, table = self.kv_plan.pages_per_slot, self.slots.page_table
        for i in range(0, len(entries), size):
            table = self._write_pages(table, *self._page_entries(entries[i : i + size]))
        self.slots = _with_table(self.slots, table)

    def update_weights(self, params: Params | dict[str, Any]) -> None:
        """Swaps the parameters for others of the same shapes, without recompiling.

        Raises:
          ModelError: a parameter is missing, unknown or misshaped.
        """
        given = params.arrays if isinstance(params, Params) else params
        wanted = targets(self.spec, self.mesh)
        if set(given) != set(wanted):
            missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
            raise ModelError(
                f"update_weights: missing {missing[:5]}, unknown {extra[:5]}: give the same tree"
            )
        for path, target in wanted.items():
            if tuple(given[path].shape) != tuple(target.shape):
                raise ModelError(
                    f"update_weights: {path} has shape {tuple(given[path].shape)}, expected {tuple(target.shape)}"
                )
        self.params = {
            path: jax.device_put(jnp.asarray(given[path], target.dtype), target.sharding)
            for path, target in wanted.items()
        }


def _write_pages(table: jax.Array, slots: jax.Array, indices: jax.Array, pages: jax.Array) -> jax.Array:
    return table.at[slots, indices].set(pages, mode="drop")


def _with_table(state: SlotState, table: jax.Array) -> SlotState:
    return SlotState(**{**vars(state), "page_table": table})
