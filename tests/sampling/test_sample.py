"""Draws of the jitted sampler against the exact distribution, for every parameter alone and together.

Requests go through the host's packing too, and all cases share one batch: rows must not disturb each other.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer import SamplingParams
from jinfer.packing import FIELDS, slot_fields
from jinfer.request import Request
from jinfer.sampling import sample as sampler
from jinfer.sampling.sample import (
    Logprobs,
    choose,
    draw,
    draw_among_best,
    keep_min_p,
    keep_top,
    largest,
    logprobs_of,
    sample,
)
from jinfer.slots import row_params, slot_tables
from tests.support.distribution import adjusted_logits, chi_square_z, exact_probabilities

VOCAB = 48
LIMIT = 4.0  # standard deviations; the draws are the same in every run, so this passes always or never
RANDOM = np.random.default_rng(0)
LOGITS = (2.5 * RANDOM.standard_normal(VOCAB)).astype(np.float32)
PROMPT = (3, 3, 11, 20, 21, 22, 40)
OUTPUT = (5, 5, 5, 11, 12, 30, 41)
ENDS = (1, 8, 30)
NEXT = len(PROMPT) + len(OUTPUT)  # the position to be drawn
SEED, BAN_UNTIL = FIELDS.index("seed_low"), FIELDS.index("ban_until")

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature_low": {"temperature": 0.35},
    "temperature_high": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_k_one": {"top_k": 1},
    "top_k_beyond_vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "top_p_high": {"top_p": 0.999},
    "top_p_tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.08},
    "min_p_tiny": {"min_p": 1e-4},
    "min_p_one": {"min_p": 1.0},
    "presence": {"presence_penalty": 1.5},
    "presence_negative": {"presence_penalty": -1.5},
    "frequency": {"frequency_penalty": 0.9},
    "frequency_negative": {"frequency_penalty": -0.9},
    "repetition": {"repetition_penalty": 1.8},
    "repetition_below_one": {"repetition_penalty": 0.6},
    "logit_bias": {"logit_bias": {0: 3.0, 5: -2.0, 47: 5.0, 20: -100.0}},
    "min_tokens": {"min_tokens": 8},
    "min_tokens_reached": {"min_tokens": 7},
    "temperature_then_top_k": {"temperature": 2.0, "top_k": 12},
    "temperature_then_top_p": {"temperature": 2.0, "top_p": 0.7},
    "temperature_then_min_p": {"temperature": 2.0, "min_p": 0.3},
    "top_k_then_top_p": {"top_k": 10, "top_p": 0.75},
    "top_p_then_min_p": {"top_p": 0.9, "min_p": 0.1},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalties_then_bias": {"repetition_penalty": 2.0, "logit_bias": {5: 4.0, 11: 4.0, 3: -1.0}},
    "all": {
        "temperature": 1.4,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": {2: 2.0, 30: 6.0},
        "min_tokens": 9,
    },
}


@dataclass
class Rows:
    """Requests as the device sees them: `fields` per row, tables per slot, one slot per request."""

    fields: jax.Array
    tables: tuple[jax.Array, ...]
    slots: jax.Array
    position: int

    def draw(self, logits: jax.Array) -> tuple[np.ndarray, Logprobs]:
        positions = jnp.full(len(self.fields), self.position, jnp.int32)
        return _draw(logits, self.fields, self.tables, self.slots, positions)


# Some hundred thousand draws take longer than compiling them well.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
def _draw(logits, fields, tables, slots, position):
    rows = row_params(fields, jnp.ones(fields.shape[0], bool), position)
    history, bias_ids, bias, end_ids = tables
    return sample(logits, rows, history, bias_ids, bias, end_ids, slots)


def rows_of(requests: Sequence[Request], position: int) -> Rows:
    tables = [slot_tables(request, VOCAB) for request in requests]
    stacked = tuple(
        jnp.stack([jnp.asarray(getattr(t, name)) for t in tables])
        for name in ("history", "bias_ids", "bias", "end_ids")
    )
    count = len(requests)
    fields = jnp.stack([jnp.asarray(slot_fields(request)) for request in requests])
    return Rows(fields, stacked, jnp.arange(count), position)


def request(params: SamplingParams, seed: int = 0, output: Sequence[int] = OUTPUT) -> Request:
    return Request(
        "r", PROMPT, params, seed=seed, output_token_ids=list(output), banned_token_ids=frozenset(ENDS)
    )


@pytest.fixture(scope="module")
def counts():
    """Counts of 12,288 draws per case: seeds 0 to 1023 at 12 positions, all cases in one batch."""
    slots = rows_of([request(SamplingParams(**case)) for case in CASES.values()], 0)
    case = np.repeat(np.arange(len(CASES)), 1024)
    fields = np.array(slots.fields)[case]
    fields[:, SEED] = np.tile(np.arange(1024), len(CASES))
    logits = jnp.tile(jnp.asarray(LOGITS), (len(fields), 1))
    counts = np.zeros((len(CASES), VOCAB), np.int64)
    for position in range(NEXT, NEXT + 12):
        rows = Rows(jnp.asarray(fields), slots.tables, jnp.asarray(case), position)
        np.add.at(counts, (case, np.asarray(rows.draw(logits)[0])), 1)
        # The draw changes with the position, and the distribution shall not: min_tokens moves along.
        fields[:, BAN_UNTIL] += 1
    return dict(zip(CASES, counts, strict=True))


def expected(name: str) -> np.ndarray:
    return exact_probabilities(LOGITS, SamplingParams(**CASES[name]), PROMPT, OUTPUT, ENDS)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(counts, name):
    z = chi_square_z(counts[name], expected(name))
    # Far too good a fit would mean that draws are not independent.
    assert -LIMIT < z < LIMIT


def test_the_chi_square_test_can_fail(counts):
    """Every case is told from every other one that has another distribution, and slight errors are seen."""
    for name in CASES:
        for other in CASES:
            if np.abs(expected(name) - expected(other)).max() > 0.02:
                assert chi_square_z(counts[name], expected(other)) > LIMIT, (name, other)
    slightly = exact_probabilities(LOGITS, SamplingParams(temperature=1.08))
    assert chi_square_z(counts["plain"], slightly) > LIMIT
    masked_too_early = exact_probabilities(LOGITS, SamplingParams(top_p=0.7))
    assert chi_square_z(counts["temperature_then_top_p"], masked_too_early) > LIMIT


def test_draws_at_different_positions_and_seeds_are_independent():
    """Pairs of draws: of one seed at neighbouring positions, and of neighbouring seeds at one position."""
    small = jnp.tile(jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1], jnp.float32)), (8192, 1))
    small = jnp.pad(small, ((0, 0), (0, VOCAB - 4)), constant_values=-jnp.inf)
    base = rows_of([request(SamplingParams())], 0)
    fields = np.repeat(np.array(base.fields), 8192, axis=0)
    fields[:, SEED] = np.arange(8192)
    slots = jnp.zeros(8192, jnp.int32)
    drawn = []
    for position in (100, 101):
        drawn.append(np.asarray(Rows(jnp.asarray(fields), base.tables, slots, position).draw(small)[0]))
    pair = np.outer([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]).ravel()
    for first, second in ((drawn[0], drawn[1]), (drawn[0][:-1:2], drawn[0][1::2])):
        counts = np.bincount(first * 4 + second, minlength=16)
        assert abs(chi_square_z(counts, pair)) < LIMIT


def test_a_draw_depends_on_seed_and_position_alone():
    """Not on the row, the slot, the batch's size, or what else is asked for beside it."""
    logits = jnp.asarray(RANDOM.standard_normal((64, VOCAB)), jnp.float32)
    asked = [SamplingParams(temperature=1.5), SamplingParams(top_p=0.6), SamplingParams(temperature=0.0)]
    together = [request(asked[i % 3], seed=100 + i) for i in range(64)]
    crowd, _ = rows_of(together, 9).draw(logits)
    for i in (0, 1, 2, 40, 63):
        alone, _ = rows_of(together[i : i + 1], 9).draw(logits[i : i + 1])
        assert int(alone[0]) == int(crowd[i])


@pytest.mark.parametrize("other", [1, -7, 7 + 2**32, -(2**63), 2**63 - 1, 7 + 2**62])
def test_every_bit_of_the_seed_counts(other):
    logits = jnp.zeros((64, VOCAB), jnp.float32)
    drawn = [
        np.asarray(rows_of([request(SamplingParams(), seed=seed)] * 64, 0).fields) for seed in (7, other)
    ]
    position = jnp.arange(64, dtype=jnp.int32)
    tables = rows_of([request(SamplingParams())], 0).tables
    first, second = (
        np.asarray(_draw(logits, jnp.asarray(f), tables, jnp.zeros(64, jnp.int32), position)[0])
        for f in drawn
    )
    assert np.mean(first == second) < 0.2


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-30, 1e-44, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = jnp.asarray(30 * RANDOM.standard_normal((8, VOCAB)), jnp.float32)
    choices: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.2}]
    for more in choices:
        params = SamplingParams(temperature=temperature, **more)
        tokens, _ = rows_of([request(params, seed=i) for i in range(8)], 3).draw(logits)
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


def test_the_highest_temperature_is_nearly_uniform():
    params = SamplingParams(temperature=100.0)
    logits = jnp.tile(jnp.asarray(LOGITS), (4096, 1))
    fields = np.repeat(np.array(rows_of([request(params)], 3).fields), 4096, axis=0)
    fields[:, SEED] = np.arange(4096)
    base = rows_of([request(params)], 3)
    tokens, _ = Rows(jnp.asarray(fields), base.tables, jnp.zeros(4096, jnp.int32), 3).draw(logits)
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert abs(chi_square_z(counts, exact_probabilities(LOGITS, params))) < LIMIT


def test_the_rarest_noise_never_draws_a_dropped_token(monkeypatch):
    """The generator's largest number stands for noise of minus infinity, which a dropped token also has."""

    class AllOnes:
        @staticmethod
        def bind(high, low, position, index):
            ones = jnp.full(index.shape, 0xFFFFFFFF, jnp.uint32)
            return [ones, ones]

    monkeypatch.setattr(sampler, "threefry2x32_p", AllOnes)
    logits = jnp.full((2, VOCAB), -jnp.inf, jnp.float32).at[0, 17].set(0.0).at[1, 30].set(-3.0)
    rows = rows_of([request(SamplingParams())] * 2, 3)
    params = row_params(rows.fields, jnp.ones(2, bool), jnp.full(2, 3, jnp.int32))
    assert draw(logits, params).tolist() == [17, 30]


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be():
    """Eight tokens of probability 2^-13 each: the tail of the noise must be right, not only its bulk."""
    logits = np.zeros(VOCAB, np.float32)
    logits[:8] = np.log(2.0**-13 * (VOCAB - 8))
    rows = rows_of([request(SamplingParams())], 0)
    fields = np.repeat(np.array(rows.fields), 16384, axis=0)
    fields[:, SEED] = np.arange(16384)
    slots = jnp.zeros(16384, jnp.int32)
    batch = jnp.tile(jnp.asarray(logits), (16384, 1))
    rare = sum(
        int(np.sum(np.asarray(Rows(jnp.asarray(fields), rows.tables, slots, p).draw(batch)[0]) < 8))
        for p in range(8)
    )
    wanted = 8 * 16384 * exact_probabilities(logits, SamplingParams())[:8].sum()
    assert abs(rare - wanted) < LIMIT * wanted**0.5


@pytest.mark.parametrize("vocab", [1, 2, 64, 255, 256, 257, 320, 1000])
def test_largest_is_the_first_maximum(vocab):
    values = np.random.default_rng(vocab).integers(0, 5, (6, vocab)).astype(np.float32)
    values[0] = -np.inf
    assert np.asarray(largest(jnp.asarray(values))[0]).tolist() == values.argmax(axis=1).tolist()


def test_ties_at_a_threshold_all_stay():
    logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0, 0.0] + [-50.0] * (VOCAB - 5)] * 512, jnp.float32)
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.55)):
        tokens, _ = rows_of([request(params, seed=i, output=()) for i in range(512)], 3).draw(logits)
        assert set(np.asarray(tokens).tolist()) == {0, 1, 2, 3}


def test_signed_zeros_tie():
    logits = jnp.asarray([[-0.0, 0.0, -0.0] + [-9.0] * (VOCAB - 3)] * 256, jnp.float32)
    tokens, _ = rows_of([request(SamplingParams(top_k=1), seed=i) for i in range(256)], 3).draw(logits)
    assert set(np.asarray(tokens).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["presence", "frequency", "repetition", "logit_bias", "min_tokens", "all"])
def test_greedy_rows_are_penalized_too(name):
    params = SamplingParams(**{**CASES[name], "temperature": 0.0})
    tokens, _ = rows_of([request(params)], NEXT).draw(jnp.asarray(LOGITS)[None])
    assert int(tokens[0]) == np.argmax(adjusted_logits(LOGITS, params, PROMPT, OUTPUT, ENDS))


def test_logprobs_are_of_the_raw_distribution():
    logits = (4 * RANDOM.standard_normal((6, VOCAB))).astype(np.float32)
    params = SamplingParams(temperature=0.5, top_k=3, logit_bias={4: 50.0}, logprobs=5)
    tokens, table = rows_of([request(params, seed=i) for i in range(6)], 3).draw(jnp.asarray(logits))
    assert set(np.asarray(tokens).tolist()) == {4}
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(table.chosen, expected[:, 4], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(table.rank, 1 + np.sum(logits > logits[:, 4:5], axis=1))
    best = np.argsort(-logits, axis=1)[:, :20]
    np.testing.assert_array_equal(table.top_ids, best)
    np.testing.assert_allclose(table.top, np.take_along_axis(expected, best, 1), rtol=1e-5, atol=1e-5)


def test_logprobs_of_a_vocabulary_smaller_than_the_table():
    logits = jnp.asarray(RANDOM.standard_normal((2, 6)), jnp.float32)
    table = logprobs_of(logits, jnp.asarray([1, 5]))
    assert table.top_ids.shape == table.top.shape == (2, 20)
    assert np.isneginf(table.top[:, 6:]).all()
    np.testing.assert_allclose(np.exp(table.top[:, :6]).sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("vocab", [64, 640, 6400, 700])
def test_alternatives_are_the_best_of_the_parts_best(vocab):
    values = np.random.default_rng(vocab).integers(0, 40, (3, vocab)).astype(np.float32)  # many are equal
    table = logprobs_of(jnp.asarray(values), jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(table.top_ids, np.argsort(-values, axis=1, kind="stable")[:, :20])


def test_rows_sampled_some_at_a_time_are_the_same():
    requests = [request(SamplingParams(**case, logprobs=3), seed=i) for i, case in enumerate(CASES.values())]
    requests = requests[: len(requests) // 3 * 3]
    rows = rows_of(requests, NEXT)
    logits = jnp.tile(jnp.asarray(LOGITS), (len(requests), 1))
    params = row_params(rows.fields, jnp.ones(len(requests), bool), jnp.full(len(requests), NEXT, jnp.int32))
    history, bias_ids, bias, end_ids = rows.tables
    arguments = logits, params, history, bias_ids, bias, end_ids, rows.slots
    tokens, table = sample(*arguments)
    some, some_table = sample(*arguments, at_once=3)
    np.testing.assert_array_equal(some, tokens)
    for one, other in zip(some_table, table, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 32},
    {"top_k": 33},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 200, "top_p": 0.5},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 3.0},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 1e-5},
    {"temperature": 0.7},
    {"temperature": 0.0},
]


def wide_rows(spread: float, count: int = 8) -> tuple[jax.Array, Any]:
    """Logits [rows, 600] and parameters: every filter in `count` rows, some or all logits tied."""
    random = np.random.default_rng(5)
    requests = [request(SamplingParams(**case), seed=i) for case in FILTERS for i in range(count)]
    logits = spread * random.standard_normal((len(requests), 600))
    logits[1::4] = np.round(logits[1::4])
    logits[2::8] = 1.5
    positions = jnp.arange(len(requests), dtype=jnp.int32)
    return jnp.asarray(logits, jnp.float32), row_params(
        rows_of(requests, 0).fields, jnp.ones(len(requests), bool), positions
    )


@pytest.mark.parametrize("spread", [0.2, 2.0, 6.0])
def test_the_best_tokens_are_enough_or_the_vocabulary_is_searched(spread):
    """The same tokens in both ways, in a batch where some rows need the vocabulary and in rows by themselves."""
    logits, rows = wide_rows(spread)
    wanted = np.asarray(choose(logits, rows)[0])
    np.testing.assert_array_equal(choose(logits, rows, 32)[0], wanted)
    one_by_one = jax.jit(lambda x, r: choose(x, r, 32)[0])
    for i in range(0, len(wanted), 5):
        alone = one_by_one(logits[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], rows))
        assert int(alone[0]) == wanted[i]


def test_the_best_tokens_are_sure_where_the_filters_leave_fewer():
    logits, rows = wide_rows(2.0)
    warm = logits - jnp.max(logits, axis=1, keepdims=True)
    kept = jnp.sum(keep_min_p(keep_top(warm, rows.top_k, rows.top_p), rows.min_p) > -jnp.inf, axis=1)
    # With more than 32 left by top-k the mass that top-p is a part of is not known.
    reach = (rows.top_k <= 0) | (
        jnp.sum(keep_top(warm, rows.top_k, jnp.ones_like(rows.top_p)) > -jnp.inf, axis=1) < 32
    )
    _, sure = draw_among_best(warm, rows, 32)
    np.testing.assert_array_equal(sure, (kept < 32) & reach)
    assert 0.3 < np.mean(np.asarray(sure)) < 0.9


def test_nobody_asked_for_logprobs():
    _, table = rows_of([request(SamplingParams())], 3).draw(jnp.asarray(LOGITS)[None])
    assert not np.asarray(table.top).any()
