"""What lives on device per slot from step to step, so that a step uploads only what changed.

S slots and one trash slot (index S) that takes the writes of padded rows. A running request owns one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jinfer.packing import FIELDS, NUM_FIELDS
from jinfer.request import Request
from jinfer.sampling.params import MAX_LOGIT_BIAS, MAX_STOP_IDS
from jinfer.sampling.sample import RowParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """Donated to every step and updated in place."""

    last_token: Int[Array, "S"]
    page_tables: tuple[Int[Array, "S MP"], ...]  # one per page group
    fields: Int[Array, "S F"]  # sampling parameters, see `packing.FIELDS`
    history: Int[
        Array, "S V"
    ]  # 2 * (times in the output) + (1 if in the prompt); set where a request needs it
    bias_ids: Int[Array, "S B"]  # V where unused
    bias: Float[Array, "S B"]
    end_ids: Int[Array, "S N"]  # V where unused


def slot_shapes(num_slots: int, pages_per_slot: int, num_groups: int, vocab_size: int) -> SlotState:
    """Shapes of the state, the trash slot included."""
    rows = num_slots + 1

    def shape(dtype, *size: int) -> Any:  # a ShapeDtypeStruct stands for the array
        return jax.ShapeDtypeStruct((rows, *size), dtype)

    return SlotState(
        last_token=shape(jnp.int32),
        page_tables=(shape(jnp.int32, pages_per_slot),) * num_groups,
        fields=shape(jnp.int32, NUM_FIELDS),
        history=shape(jnp.int32, vocab_size),
        bias_ids=shape(jnp.int32, MAX_LOGIT_BIAS),
        bias=shape(jnp.float32, MAX_LOGIT_BIAS),
        end_ids=shape(jnp.int32, MAX_STOP_IDS),
    )


def row_params(fields: Int[Array, "R F"], live: Array, position: Int[Array, "R"]) -> RowParams:
    """The sampler's view of rows of the parameter table; rows that are not `live` ask for nothing."""
    column = {name: fields[:, i] for i, name in enumerate(FIELDS)}

    def real(name: str) -> Array:
        return lax.bitcast_convert_type(column[name], jnp.float32)

    seed = jnp.stack([column["seed_high"], column["seed_low"]], axis=1)
    return RowParams(
        features=jnp.where(live, column["features"], 0),
        temperature=real("temperature"),
        top_k=column["top_k"],
        top_p=real("top_p"),
        min_p=real("min_p"),
        repetition=real("repetition"),
        presence=real("presence"),
        frequency=real("frequency"),
        seed=lax.bitcast_convert_type(seed, jnp.uint32),
        position=position,
        ban_until=column["ban_until"],
    )


@dataclass(frozen=True)
class SlotTables:
    """Host rows of the tables that only some requests need; uploaded once when such a request gets its slot."""

    history: np.ndarray  # int32[V]
    bias_ids: np.ndarray  # int32[B]
    bias: np.ndarray  # float32[B]
    end_ids: np.ndarray  # int32[N]


def slot_tables(request: Request, vocab_size: int) -> SlotTables:
    """The tables of one request as it stands: output tokens it already has (after a preemption) count."""
    params = request.params
    history = np.zeros(vocab_size, np.int32)
    if params.needs_history:
        history += 2 * np.bincount(
            np.asarray(request.output_token_ids, np.int64), minlength=vocab_size
        ).astype(np.int32)
        history[np.asarray(request.prompt_token_ids, np.int64)] |= 1
    bias_ids, bias = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32), np.zeros(MAX_LOGIT_BIAS, np.float32)
    if params.logit_bias:
        n = len(params.logit_bias)
        bias_ids[:n], bias[:n] = list(params.logit_bias.keys()), list(params.logit_bias.values())
    return SlotTables(history, bias_ids, bias, _padded(sorted(request.banned_token_ids), vocab_size))


def _padded(ids: Sequence[int], filler: int) -> np.ndarray:
    row = np.full(MAX_STOP_IDS, filler, np.int32)
    row[: len(ids)] = ids
    return row


def load_tables(state: SlotState, slot: Array, tables: tuple[Array, Array, Array, Array]) -> SlotState:
    """The state with one slot's tables replaced (jitted by the runner, the state donated)."""
    history, bias_ids, bias, end_ids = tables
    return replace(
        state,
        history=state.history.at[slot].set(history),
        bias_ids=state.bias_ids.at[slot].set(bias_ids),
        bias=state.bias.at[slot].set(bias),
        end_ids=state.end_ids.at[slot].set(end_ids),
    )


def write_pages(tables: tuple[Array, ...], slots: Array, indices: Array, *pages: Array) -> tuple[Array, ...]:
    """The groups' tables with pages[g][i] at place indices[i] of slot slots[i]."""
    return tuple(
        table.at[slots, indices].set(ids, mode="drop") for table, ids in zip(tables, pages, strict=True)
    )
