"""Logits to tokens, on device.

Order: repetition penalty, frequency and presence penalty, logit bias, end tokens banned before min_tokens,
temperature, top-k, top-p, min-p, draw. Top-k and top-p find their threshold by bisection over the bit patterns of the
logits: exact, and without sorting the vocabulary. Tokens tied at the threshold all stay.

A draw adds Gumbel noise made from fold_in(key(seed), position), so it depends on its own request alone.
Work that no row asks for is skipped at run time (`lax.cond`), without another compiled program.

R rows, V vocabulary, B logit-bias entries per slot, N end tokens per slot.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jinfer.sampling.features import BAN, BIAS, HISTORY, LOGPROBS, MIN_P, RANDOM, TOP_K, TOP_P
from jinfer.sampling.params import MAX_LOGPROBS

NEVER = jnp.float32(-jnp.inf)


class RowParams(NamedTuple):
    """One entry per row, gathered from the slots."""

    features: Int[Array, "R"]  # bits of `features`; 0 for padded rows
    temperature: Float[Array, "R"]
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    repetition: Float[Array, "R"]
    presence: Float[Array, "R"]
    frequency: Float[Array, "R"]
    seed: Int[Array, "R 2"]  # uint32 halves
    position: Int[Array, "R"]  # of the token to be drawn
    ban_until: Int[Array, "R"]  # end tokens are banned at positions below this


class Logprobs(NamedTuple):
    """Of the raw distribution. Zeros where no row asked."""

    chosen: Float[Array, "R"]
    rank: Int[Array, "R"]  # 1 is the most likely
    top_ids: Int[Array, "R K"]
    top: Float[Array, "R K"]


def penalize(logits: Array, history: Int[Array, "R V"], rows: RowParams) -> Array:
    """history: 2 * (times in the output) + (1 if in the prompt)."""
    count, seen = history >> 1, history > 0
    factor = rows.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - rows.frequency[:, None] * count.astype(jnp.float32)
    return logits - rows.presence[:, None] * (count > 0).astype(jnp.float32)


def _ordered(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """int32 keys in the order of float32 values (-0.0 and 0.0 tie as the neighbours they are)."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _largest_threshold(keys: Int[Array, "R V"], enough) -> Int[Array, "R"]:
    """The largest t per row for which enough(keys >= t) holds; it holds for the smallest t.

    32 halvings of the int32 range; `enough` maps a mask [R, V] to bool[R] and falls as t rises.
    """
    rows = keys.shape[0]

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough(low) holds, enough(high + 1) does not
        middle = (low | high) - ((low ^ high) >> 1)  # the mean rounded up, without overflow
        ok = enough(keys >= middle[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    bounds = (jnp.full(rows, -(2**31), jnp.int32), jnp.max(keys, axis=1))
    return lax.fori_loop(0, 32, halve, bounds)[0]


def keep_top_k(logits: Array, top_k: Int[Array, "R"]) -> Array:
    """Drops all but the k largest; k <= 0 keeps all."""
    size = jnp.where(top_k <= 0, logits.shape[1], jnp.minimum(top_k, logits.shape[1]))
    keys = _ordered(logits)
    bound = _largest_threshold(keys, lambda mask: jnp.sum(mask, axis=1, dtype=jnp.int32) >= size)
    return jnp.where(keys >= bound[:, None], logits, NEVER)


def keep_top_p(logits: Array, top_p: Float[Array, "R"]) -> Array:
    """Drops what is outside the smallest set of most likely tokens whose mass reaches p; p >= 1 keeps all."""
    mass = jax.nn.softmax(logits, axis=1)
    keys = _ordered(logits)
    # The whole mass may round to a little less than p: then everything stays.
    bound = _largest_threshold(keys, lambda mask: jnp.sum(jnp.where(mask, mass, 0), axis=1) >= top_p)
    keep = (keys >= bound[:, None]) | (top_p >= 1)[:, None]
    return jnp.where(keep, logits, NEVER)


def keep_min_p(logits: Array, min_p: Float[Array, "R"]) -> Array:
    """Drops tokens less likely than min_p times the most likely one."""
    floor = jnp.max(logits, axis=1) + jnp.log(jnp.maximum(min_p, jnp.finfo(jnp.float32).tiny))
    return jnp.where((logits >= floor[:, None]) | (min_p <= 0)[:, None], logits, NEVER)


def draw(logits: Array, rows: RowParams) -> Int[Array, "R"]:
    """One token per row from softmax(logits), by the Gumbel maximum."""

    def noise(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    noisy = logits + jax.vmap(noise)(rows.seed.astype(jnp.uint32), rows.position)
    return jnp.argmax(noisy, axis=1).astype(jnp.int32)


def logprobs_of(logits: Array, tokens: Int[Array, "R"]) -> Logprobs:
    """Log-probability and rank of `tokens`, and the most likely alternatives."""
    total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = jnp.sum(logits > chosen, axis=1, dtype=jnp.int32) + 1
    count = min(MAX_LOGPROBS, logits.shape[1])
    top, ids = lax.top_k(logits, count)
    pad = ((0, 0), (0, MAX_LOGPROBS - count))
    return Logprobs(
        (chosen - total)[:, 0],
        rank,
        jnp.pad(ids.astype(jnp.int32), pad),
        jnp.pad(top - total, pad, constant_values=-jnp.inf),
    )


def no_logprobs(rows: int) -> Logprobs:
    return Logprobs(
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((rows, MAX_LOGPROBS), jnp.float32),
    )


def adjust(
    logits: Array,
    rows: RowParams,
    history: Int[Array, "R V"],
    bias_ids: Int[Array, "R B"],
    bias: Float[Array, "R B"],
    end_ids: Int[Array, "R N"],
) -> Array:
    """Penalties, logit bias and the ban on end tokens. Ids of unused entries are V: out of range, so dropped."""
    index = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]

    def flagged(bit: int) -> Bool[Array, "R 1"]:
        return ((rows.features & bit) != 0)[:, None]

    logits = jnp.where(flagged(HISTORY), penalize(logits, history, rows), logits)
    logits = logits.at[index, bias_ids].add(jnp.where(flagged(BIAS), bias, 0), mode="drop")
    banned = flagged(BAN) & (rows.position < rows.ban_until)[:, None]
    return logits.at[index, end_ids].min(jnp.where(banned, NEVER, jnp.inf), mode="drop")


def choose(logits: Array, rows: RowParams) -> Int[Array, "R"]:
    """Temperature, top-k, top-p, min-p and the draw; argmax for greedy rows."""
    any_of = lax.reduce(rows.features, jnp.int32(0), lax.bitwise_or, (0,))

    def when(bit: int, function, values: Array) -> Array:
        return lax.cond((any_of & bit) != 0, function, lambda x: x, values)

    def random(logits: Array) -> Array:
        greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)
        warm = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
        warm = when(TOP_K, lambda x: keep_top_k(x, rows.top_k), warm)
        warm = when(TOP_P, lambda x: keep_top_p(x, rows.top_p), warm)
        warm = when(MIN_P, lambda x: keep_min_p(x, rows.min_p), warm)
        return jnp.where((rows.features & RANDOM) != 0, draw(warm, rows), greedy)

    return lax.cond((any_of & RANDOM) != 0, random, lambda x: jnp.argmax(x, axis=1).astype(jnp.int32), logits)


def sample(
    logits: Float[Array, "R V"],
    rows: RowParams,
    history: Int[Array, "S V"],
    bias_ids: Int[Array, "S B"],
    bias: Float[Array, "S B"],
    end_ids: Int[Array, "S N"],
    slots: Int[Array, "R"],
) -> tuple[Int[Array, "R"], Logprobs]:
    """Tokens and, if any row asked, their log-probabilities. The tables are per slot and read only where needed."""
    any_of = lax.reduce(rows.features, jnp.int32(0), lax.bitwise_or, (0,))
    adjusted = lax.cond(
        (any_of & (HISTORY | BIAS | BAN)) != 0,
        lambda x: adjust(x, rows, history[slots], bias_ids[slots], bias[slots], end_ids[slots]),
        lambda x: x,
        logits,
    )
    tokens = choose(adjusted, rows)
    logprobs = lax.cond(
        (any_of & LOGPROBS) != 0,
        lambda x: logprobs_of(x, tokens),
        lambda x: no_logprobs(x.shape[0]),
        logits,
    )
    return tokens, logprobs
