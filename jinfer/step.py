"""One engine step as one jitted function: unpack, run the layers over paged KV, sample, write the slots.

T tokens, R rows, S slots, MP pages per slot, V vocabulary; see `packing.StepShape` for what varies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jinfer.cache.pages import NULL_PAGE
from jinfer.kv_plan import KVPlan
from jinfer.layers.attention import Attend, KVKind, LayerIndex
from jinfer.mesh import partition_spec
from jinfer.models.decoder import Decoder, ModelSpec, Params
from jinfer.packing import (
    FIELDS,
    FLAG_POOLED,
    FLAG_PROMPT_LOGPROBS,
    FLAGS,
    NUM_DECODE,
    NUM_FIELDS,
    NUM_LIVE,
    StepShape,
)
from jinfer.sampling.sample import Logprobs, logprobs_of, no_logprobs, sample
from jinfer.slots import SlotState, row_params, write_pages
from pallas_kernels import paged_attention as pa

# What a step keeps beside the logits themselves, which at a vocabulary of 128,256 take 0.5 MB a row: tokens whose prompt
# log-probabilities are computed together, and rows that are sampled together.
LOGPROB_BLOCK, CPU_LOGPROB_BLOCK = 16, 64
ROWS_SAMPLED_AT_ONCE = 8
# Finding them costs a CPU a tenth of what a search of the whole vocabulary for thresholds does: 32 rows of 128,256
# logits with top-k and top-p took 165 ms, and take 17.
BEST_TRIED_FIRST = 256


class Pooled(NamedTuple):
    """Hidden states after the final norm, per row: of its last token, and summed over its tokens of this step."""

    last: Float[Array, "R E"]
    total: Float[Array, "R E"]


class StepOutput(NamedTuple):
    """What the host reads back. `prompt` and `pooled` are None in decode-only steps, zeros where nobody asked."""

    tokens: Int[
        Array, "R"
    ]  # NOT_FINITE in rows whose logits are not finite, also in those that yield no token
    logprobs: Logprobs
    prompt: Logprobs | None = None  # [T]
    pooled: Pooled | None = None


def paged_attend(
    mesh: Mesh, plan: KVPlan, batches: Sequence[pa.RaggedBatch], kv: tuple[Any, ...], num_tokens: int
) -> Attend:
    """Attention over pages, each device on its own heads; batches and kv are one per page group."""
    heads = partition_spec(("tokens", "heads", "head_dim"))
    per_head = partition_spec(("heads",))
    steps = [
        pa.prepare(batch, pool, num_tokens, implementation=plan.implementation)
        for batch, pool in zip(batches, kv, strict=True)
    ]
    num_layers = sum(len(group.layers) for group in plan.groups)
    places = []  # per group, each layer's place in it; what other groups' layers have there is never read
    for group in plan.groups:
        place = np.zeros(num_layers, np.int32)
        place[list(group.layers)] = np.arange(len(group.layers))
        places.append(jnp.asarray(place))

    def attend(
        q: Array,
        k: Array,
        v: Array,
        cache: Any,
        layer: LayerIndex,
        *,
        kind: KVKind,
        scale: float,
        soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> tuple[Array, Any]:
        def local(
            q: Array, k: Array, v: Array, kv: Any, plan: Any, offset: Array, sinks: Array | None
        ) -> tuple[Array, Any]:
            kv = pa.write_kv(kv, k, v, plan, page_offset=offset)
            y = pa.attend(
                q,
                kv,
                plan,
                page_offset=offset,
                scale=scale,
                sliding_window=kind.window,
                soft_cap=soft_cap,
                sinks=sinks,
                value_dim=kind.value_dim,
            )
            return y, kv

        index = plan.group_of(kind)
        group, own = plan.groups[index], cache[index]
        pool = pa.kv_partition_spec("tensor", kv=own, implementation=plan.implementation)
        sharded = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, heads, heads, pool, P(), P(), per_head),
            out_specs=(heads, pool),
            check_vma=False,
        )
        offset = places[index][layer.overall] * group.pages
        y, own = sharded(q, k, v, own, steps[index], offset, sinks)
        return y, (*cache[:index], own, *cache[index + 1 :])

    return attend


def make_step(spec: ModelSpec, mesh: Mesh, plan: KVPlan, shape: StepShape) -> Callable[..., Any]:
    """The function (arrays, kv, slots, packed) -> (kv, slots, StepOutput) of one compile key; kv: a pool per group."""

    def step(arrays: dict[str, Array], kv: tuple[Any, ...], state: SlotState, packed: Int[Array, "N"]):
        part = {name: packed[a:b] for name, (a, b) in shape.sections.items()}
        decoder = Params(arrays, spec).bind()
        state = _apply_updates(state, part, shape)
        slots = part["row_slot"]
        batches = _ragged_batches(state, part, plan, shape)
        batch = batches[0]
        rows = jnp.arange(shape.num_rows) if shape.decode_only else batch.token_rows(shape.num_tokens)
        token_slots = slots[rows]
        positions = batch.token_positions(shape.num_tokens)
        tokens = state.last_token[token_slots]
        if not shape.decode_only:
            tokens = jnp.where(part["tokens"] < 0, tokens, part["tokens"])
        lengths = None
        if spec.config.fixed_angles_length is not None:
            prompt = state.fields[token_slots, FIELDS.index("prompt_length")]
            lengths = jnp.maximum(prompt, positions + 1)
        attend = paged_attend(mesh, plan, batches, kv, shape.num_tokens)
        hidden, kv = decoder(tokens, positions, attend, kv, lengths, batch.num_tokens)
        last = jnp.maximum(batch.query_starts[1:] - 1, 0)
        is_cpu = spec.build.platform == "cpu"
        sampling = {
            # One after the other costs a CPU more than the memory is worth.
            "at_once": None if is_cpu else ROWS_SAMPLED_AT_ONCE,
            # Elsewhere the vocabulary lies over devices, or top-k is a sort.
            "best": BEST_TRIED_FIRST if is_cpu and mesh.size == 1 else None,
        }
        state, output = _sample(decoder, hidden[last], state, part, shape, sampling)
        if not shape.decode_only:
            block = CPU_LOGPROB_BLOCK if is_cpu else LOGPROB_BLOCK
            prompt = _prompt_logprobs(decoder, hidden, part, block)
            output = output._replace(prompt=prompt, pooled=_pooled(hidden, batch, last, part))
        return kv, state, output

    return step


def _apply_updates(state: SlotState, part: dict[str, Array], shape: StepShape) -> SlotState:
    pages = part["page_id"].reshape(shape.num_groups, -1)
    tables = write_pages(state.page_tables, part["page_slot"], part["page_index"], *pages)
    fields = state.fields
    if shape.num_admitted:
        rows = part["admitted"].reshape(-1, NUM_FIELDS)
        fields = fields.at[part["admitted_slot"]].set(rows, mode="drop")
    return replace(state, page_tables=tables, fields=fields)


def _ragged_batches(
    state: SlotState, part: dict[str, Array], plan: KVPlan, shape: StepShape
) -> list[pa.RaggedBatch]:
    """The step's rows, once for each page group with its own table."""
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(part["row_count"], dtype=jnp.int32)])
    context = part["row_context"]
    place = jnp.arange(plan.pages_per_slot, dtype=jnp.int32)
    behind = place >= (context[:, None] + plan.page_size - 1) // plan.page_size
    batches = []
    for group, tables in zip(plan.groups, state.page_tables, strict=True):
        # Outside of what a row sees its table names pages that have other owners by now. Their contents would get
        # weight 0, but 0 times another sequence's NaN is NaN.
        unseen = behind
        if (window := group.kind.window) is not None:
            first_page = jnp.maximum(context - part["row_count"] - window + 1, 0) // plan.page_size
            unseen |= place < first_page[:, None]
        table = jnp.where(unseen, NULL_PAGE, tables[part["row_slot"]])
        batches.append(
            pa.RaggedBatch(
                query_starts=starts,
                context_lens=context,
                page_table=table,
                num_decode_rows=part["head"][NUM_DECODE],
                num_rows=part["head"][NUM_LIVE],
                decode_only=shape.decode_only,
            )
        )
    return batches


def _sample(
    decoder: Decoder,
    hidden: Float[Array, "R E"],
    state: SlotState,
    part: dict[str, Array],
    shape: StepShape,
    sampling: dict[str, int | None],
) -> tuple[SlotState, StepOutput]:
    slots = part["row_slot"]
    yields = part["row_sample"] != 0
    params = row_params(state.fields[slots], yields, part["row_context"])
    logits = decoder.logits(hidden)
    tokens, logprobs = sample(
        logits, params, state.history, state.bias_ids, state.bias, state.end_ids, slots, **sampling
    )
    # Rows that yield nothing write to the trash slot.
    target = jnp.where(yields, slots, shape.trash_slot)
    real = jnp.maximum(tokens, 0)  # a row without a token ends when the host reads that
    state = replace(
        state,
        last_token=state.last_token.at[target].set(real, mode="drop"),
        history=state.history.at[target, real].add(2, mode="drop"),
    )
    return state, StepOutput(tokens, logprobs)


def _prompt_logprobs(
    decoder: Decoder, hidden: Float[Array, "T E"], part: dict[str, Array], block: int
) -> Logprobs:
    """Log-probability of each token's successor in the prompt, if any row of the step asked; `block` tokens at a time,
    so that no [T, V] array exists."""
    num_tokens = hidden.shape[0]

    def compute(hidden: Array) -> Logprobs:
        size = min(block, num_tokens)
        pad = -num_tokens % size
        hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[1])
        targets = jnp.pad(part["targets"], (0, pad)).reshape(-1, size)
        blocks = lax.map(lambda xs: logprobs_of(decoder.logits(xs[0]), xs[1]), (hidden, targets))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_tokens], blocks)

    wanted = (part["head"][FLAGS] & FLAG_PROMPT_LOGPROBS) != 0
    return lax.cond(wanted, compute, lambda x: no_logprobs(num_tokens), hidden)


def _pooled(
    hidden: Float[Array, "T E"], batch: pa.RaggedBatch, last: Int[Array, "R"], part: dict[str, Array]
) -> Pooled:
    """float32, if any row of the step asked."""
    num_tokens, num_rows = hidden.shape[0], last.shape[0]

    def compute(hidden: Array) -> Pooled:
        wide = hidden.astype(jnp.float32)
        live = jnp.arange(num_tokens) < batch.query_starts[-1]
        total = jax.ops.segment_sum(
            jnp.where(live[:, None], wide, 0.0), batch.token_rows(num_tokens), num_rows
        )
        return Pooled(wide[last], total)

    def skip(hidden: Array) -> Pooled:
        zeros = jnp.zeros((num_rows, hidden.shape[1]), jnp.float32)
        return Pooled(zeros, zeros)

    return lax.cond((part["head"][FLAGS] & FLAG_POOLED) != 0, compute, skip, hidden)
