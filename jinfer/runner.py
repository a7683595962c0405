"""The only room that turns a Batch into arrays and calls jit.

Every step program is compiled before the engine is ready and kept as a compiled executable; one that is missing
later is compiled on the spot and counted in `recompiles`, which must stay 0.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jinfer.config import EngineConfig
from jinfer.errors import ModelError, WeightsError
from jinfer.kv_plan import KVPlan
from jinfer.models.decoder import Params
from jinfer.models.loading import LoadedModel, targets
from jinfer.packing import StepShape, pack
from jinfer.programs import StepPrograms
from jinfer.request import RequestFault, TokenLogprobs
from jinfer.sampling.features import needs_tables
from jinfer.sampling.sample import Logprobs
from jinfer.schedule.batch import Batch
from jinfer.slots import load_tables, slot_tables, write_pages
from jinfer.step import Pooled, StepOutput
from jinfer.weight_update import check_update, place

logger = logging.getLogger(__name__)

COMPILE_THREADS = 4
IMPOSSIBLE = -math.inf  # log-probability of a token that cannot come
INCOMPLETE = "the engine has no weights and takes no requests until a full update has succeeded"


@dataclass
class StepHandle:
    """A dispatched step. Reading blocks until the device is done with it."""

    batch: Batch
    output: StepOutput
    weights_version: int = 0  # of the weights that it computes with

    def tokens(self) -> list[int]:
        return np.asarray(self.output.tokens)[: len(self.batch.rows)].tolist()

    def logprobs(self) -> HostLogprobs:
        """One entry per row."""
        return HostLogprobs.read(self.output.logprobs, len(self.batch.rows))

    def prompt_logprobs(self) -> HostLogprobs | None:
        """One entry per token of the batch."""
        table = self.output.prompt
        return None if table is None else HostLogprobs.read(table, self.batch.num_tokens)

    def pooled(self) -> Pooled | None:
        return jax.tree.map(np.asarray, self.output.pooled)


class HostLogprobs(NamedTuple):
    """`Logprobs` as Python numbers. Reading elements of arrays one by one would take five times as long."""

    chosen: list[float]
    rank: list[int]
    top_ids: list[list[int]]
    top: list[list[float]]

    @classmethod
    def read(cls, table: Logprobs, count: int) -> HostLogprobs:
        """The first `count` positions of a table on device."""
        return cls(*(np.asarray(array)[:count].tolist() for array in table))

    def of(self, at: int, token: int, count: int) -> TokenLogprobs:
        """One position as the API gives it: `count` of the most likely tokens, but for those that cannot come."""
        ids, top = self.top_ids[at][:count], self.top[at][:count]
        if IMPOSSIBLE in top:
            given = top.index(IMPOSSIBLE)
            ids, top = ids[:given], top[:given]
        return TokenLogprobs(token, self.chosen[at], self.rank[at], tuple(ids), tuple(top))


class Runner:
    """Owns parameters, KV pages and slots on device."""

    def __init__(self, model: LoadedModel, config: EngineConfig, kv: KVPlan) -> None:
        self.mesh, self.spec, self.kv_plan, self.config = model.mesh, model.spec, kv, config
        self.params: dict[str, Any] = dict(model.params.arrays)  # all, or none
        self.weights_version = 0  # updates so far
        self.programs = StepPrograms(self.spec, self.mesh, config, kv)
        self.recompiles = 0
        self.is_preparing = False  # compiles a step, or takes over weights: no step can end meanwhile
        self.prepared_time = 0.0  # when that last ended
        self._compiled: dict[StepShape, Any] = {}
        self.kv: Any = None
        self.slots: Any = None  # a SlotState
        self.make_state()
        slot_shardings = jax.tree.map(lambda x: x.sharding, self.programs.slots)
        self._load_tables = jax.jit(load_tables, donate_argnums=0, out_shardings=slot_shardings)
        self._write_pages = jax.jit(write_pages, donate_argnums=0, out_shardings=slot_shardings.page_tables)

    # Memory

    @property
    def cache_dtype(self) -> Any:
        """The type of the KV pages' numbers."""
        return jax.tree.leaves(self.kv)[0].dtype

    def _zeros(self, abstract: Any) -> Any:
        shardings = jax.tree.map(lambda s: s.sharding, abstract)
        make = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract), out_shardings=shardings
        )
        return make()

    def make_state(self) -> None:
        """KV and slots, all zero."""
        self.kv = self.slots = None  # first, so that no two are there at once
        self.kv = self._zeros(self.programs.kv)
        self.slots = self._zeros(self.programs.slots)

    def lost_state(self) -> bool:
        """After a step that failed: whether KV and slots went with it, so that `make_state` has to make new ones."""
        arrays = jax.tree.leaves((self.kv, self.slots))
        try:
            # What a failed program was to write raises what the program raised; what was donated to it raises too.
            jax.block_until_ready(arrays)
        except Exception:
            logger.warning("a failed step took the KV pages with it", exc_info=True)
            return True
        return self.slots is None or any(array.is_deleted() for array in arrays)

    # Compiling

    def warmup(self) -> float:
        """Compiles every step; returns the seconds it took."""
        start = time.monotonic()
        programs = self.programs
        self._recall(programs.all_shapes())
        missing = [s for s in programs.all_shapes() if s not in self._compiled]
        # Tracing holds the interpreter's lock, compiling does not: the pool compiles what is traced so far.
        with ThreadPoolExecutor(max_workers=COMPILE_THREADS) as pool:
            futures = [(s, pool.submit(programs.compile, programs.lower(s))) for s in missing]
            for shape, future in futures:
                self._keep(shape, future.result())
        self.slots = self._load_tables(self.slots, jnp.int32(0), self._empty_tables())
        tables = self._write_pages(self.slots.page_tables, *self._page_entries([]))
        self.slots = replace(self.slots, page_tables=tables)
        jax.block_until_ready(self.slots)
        return time.monotonic() - start

    def _program(self, shape: StepShape) -> Any:
        program = self._compiled.get(shape)
        if program is None:
            if self.config.warmup:
                self.recompiles += 1
                logger.warning("compiling step %s while serving: this is a bug, please report it", shape)
            self._recall([shape])
            if shape not in self._compiled:
                with self.preparing():
                    self._keep(shape, self.programs.compile(self.programs.lower(shape)))
            program = self._compiled[shape]
        return program

    def _recall(self, shapes: list[StepShape]) -> None:
        for shape in shapes:
            if shape not in self._compiled and (program := self.programs.recall(shape)) is not None:
                self._compiled[shape] = program

    def _keep(self, shape: StepShape, program: Any) -> None:
        self._compiled[shape] = program
        self.programs.remember(shape, program)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Says to those who watch from other threads that no step can end meanwhile."""
        self.is_preparing = True
        try:
            yield
        finally:
            self.is_preparing, self.prepared_time = False, time.monotonic()

    # Running

    def dispatch(self, batch: Batch) -> StepHandle:
        """Starts one step and the copy of its tokens to the host; returns at once.

        Raises:
          RequestFault: a request's data cannot be packed. WeightsError: an update of the weights failed midway. Nothing
          has been started then.
        """
        if not self.has_weights:
            raise WeightsError(INCOMPLETE)
        shape = self.programs.shape_for(batch.decode_only, len(batch.rows), batch.num_tokens)
        for request in batch.admitted:
            if needs_tables(request.params):
                self._upload_tables(request)
        packed, spilled = pack(batch, shape)
        if spilled:
            self._spill_pages(spilled)
        program = self._program(shape)
        self.kv, self.slots, output = program(self.params, self.kv, self.slots, packed)
        if not self.programs.is_cpu:
            output.tokens.copy_to_host_async()
        return StepHandle(batch, output, self.weights_version)

    def _upload_tables(self, request: Any) -> None:
        try:
            tables = slot_tables(request, self.spec.config.vocab_size)
        except Exception as error:
            raise RequestFault(request, error) from error
        values = (tables.history, tables.bias_ids, tables.bias, tables.end_ids)
        self.slots = self._load_tables(self.slots, np.int32(request.slot), values)

    def _empty_tables(self) -> Any:
        state = self.programs.slots
        names = (state.history, state.bias_ids, state.bias, state.end_ids)
        return tuple(np.zeros(s.shape[1:], s.dtype) for s in names)

    def _page_entries(self, entries: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, ...]:
        """(slots, indices, pages of each group), each of the fixed length that `write_pages` is compiled for."""
        columns = np.zeros((2 + len(self.kv_plan.groups), self.kv_plan.pages_per_slot), np.int32)
        columns[0] = self.config.max_num_seqs  # the trash slot
        if entries:
            columns[:, : len(entries)] = np.asarray(entries, np.int32).T
        return tuple(columns)

    def _spill_pages(self, entries: Sequence[tuple[int, ...]]) -> None:
        """Long prefix hits bring more pages than the packed array has room for."""
        size, tables = self.kv_plan.pages_per_slot, self.slots.page_tables
        for i in range(0, len(entries), size):
            tables = self._write_pages(tables, *self._page_entries(entries[i : i + size]))
        self.slots = replace(self.slots, page_tables=tables)

    # Weights

    @property
    def has_weights(self) -> bool:
        """False from an update that failed midway until one has succeeded: nothing can run then."""
        return bool(self.params)

    def check_weights(self, params: Params | Mapping[str, Any]) -> dict[str, Any]:
        """The arrays for `move_weights`; see `check_update`."""
        return check_update(params, targets(self.spec, self.mesh))

    def move_weights(self, checked: Mapping[str, Any]) -> None:
        """Swaps the parameters one by one, so that the old ones go as the new ones come and one at most is there twice.

        A fault before the first one leaves all as it is. A later one takes all parameters away: a mixture cannot run,
        and the memory is free for the next try.

        Raises:
          ModelError: a fault before the first one. WeightsError: a later one.
        """
        arrays, path = dict(self.params), ""
        whole = self.has_weights
        try:
            for path, target in targets(self.spec, self.mesh).items():
                new = place(checked[path], target)
                whole = False
                self.params, arrays[path] = {}, new
            self.params = arrays
            self.weights_version += 1
        except BaseException as error:
            if not whole:
                self.params = {}
            arrays.clear()  # the traceback would keep it
            if not isinstance(error, Exception):
                raise
            fault = f"update_weights: {path} could not be placed ({type(error).__name__}: {str(error)[:300]})"
            if whole:
                raise ModelError(f"{fault}: nothing is changed") from error
            raise WeightsError(f"{fault}: {INCOMPLETE}") from error

    def update_weights(self, params: Params | Mapping[str, Any]) -> None:
        """Swaps the parameters for others of the same shapes, without recompiling. The caller keeps its arrays."""
        self.move_weights(self.check_weights(params))
