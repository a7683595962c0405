"""Sampled tokens follow the exact distribution, for every parameter; a draw depends on its own request alone.

The oracle is numpy in float64, written from the parameters' definitions. Counts are compared by Pearson's chi-square,
with cells of expectation below 5 pooled; the critical value is that of probability 1e-5 (Wilson and Hilferty's
approximation), and the seeds are fixed, so a pass stays a pass.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jinfer.sampling import features
from jinfer.sampling.params import SamplingParams
from jinfer.sampling.sample import RowParams, choose, largest, sample

VOCAB = 37
ROWS = 512
ROUNDS = 24  # 12,288 draws per case
PROMPT = [3, 5, 5, 9]
OUTPUT = [7, 7, 7, 5, 30]
END_IDS = (2, 11)


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.0, VOCAB).astype(np.float32)


def exact(logits: np.ndarray, p: SamplingParams, *, banned: tuple[int, ...] = ()) -> np.ndarray:
    """The distribution by definition: penalties and bias, bans, temperature, top-k, top-p, min-p."""
    x = logits.astype(np.float64).copy()
    for t in set(PROMPT) | set(OUTPUT):
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t in set(OUTPUT):
        x[t] -= p.frequency_penalty * OUTPUT.count(t) + p.presence_penalty
    for t, b in (p.logit_bias or {}).items():
        x[t] += b
    x[list(banned)] = -np.inf
    x /= p.temperature
    order = np.argsort(-x, kind="stable")
    keep = np.ones(VOCAB, bool)
    if p.top_k > 0:
        keep[order[p.top_k :]] = False
    mass = np.where(keep, np.exp(x - x.max()), 0)
    mass /= mass.sum()
    if p.top_p < 1:
        before = np.cumsum(mass[order]) - mass[order]
        keep[order[before >= p.top_p]] = False
    keep &= mass >= p.min_p * mass.max()
    mass = np.where(keep, mass, 0)
    return mass / mass.sum()


def rows_of(p: SamplingParams, seeds: np.ndarray, position: int, ban_until: int = 0) -> RowParams:
    n = len(seeds)

    def full(value, dtype=np.float32):
        return jnp.full(n, value, dtype)

    high, low = (seeds >> 32).astype(np.uint32), (seeds & 0xFFFFFFFF).astype(np.uint32)
    return RowParams(
        features=full(features.of(p), np.int32),
        temperature=full(p.temperature),
        top_k=full(p.top_k, np.int32),
        top_p=full(p.top_p),
        min_p=full(p.min_p),
        repetition=full(p.repetition_penalty),
        presence=full(p.presence_penalty),
        frequency=full(p.frequency_penalty),
        seed=jnp.asarray(np.stack([high, low], axis=1)),
        position=full(position, np.int32),
        ban_until=full(ban_until, np.int32),
    )


def tables(p: SamplingParams):
    """history, bias_ids, bias, end_ids of one slot."""
    history = 2 * np.bincount(OUTPUT, minlength=VOCAB)
    history[PROMPT] |= 1
    bias_ids, bias = np.full(8, VOCAB, np.int32), np.zeros(8, np.float32)
    for i, (t, b) in enumerate((p.logit_bias or {}).items()):
        bias_ids[i], bias[i] = t, b
    end_ids = np.array([*END_IDS, VOCAB, VOCAB], np.int32)
    return tuple(jnp.asarray(a)[None] for a in (history.astype(np.int32), bias_ids, bias, end_ids))


run = jax.jit(lambda logits, rows, tables, slots: sample(logits, rows, *tables, slots)[0])


def counts_of(logits: np.ndarray, p: SamplingParams, ban_until: int = 0) -> np.ndarray:
    batch, slots = jnp.tile(logits, (ROWS, 1)), jnp.zeros(ROWS, jnp.int32)
    counts = np.zeros(VOCAB, np.int64)
    for i in range(ROUNDS):
        seeds = np.arange(ROWS, dtype=np.uint64) * 7919 + np.uint64(i * 10**12)
        tokens = run(batch, rows_of(p, seeds, 100 + i, ban_until), tables(p), slots)
        counts += np.bincount(np.asarray(tokens), minlength=VOCAB)
    return counts


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(statistic, critical value at 1e-5); tokens of probability 0 must not occur at all."""
    assert counts[expected == 0].sum() == 0
    e = expected * counts.sum()
    small = e < 5
    c = np.append(counts[~small], counts[small].sum())
    e = np.append(e[~small], e[small].sum())
    c, e = c[e > 0], e[e > 0]
    degrees = len(e) - 1
    if degrees == 0:
        return 0.0, 1.0
    z = 4.265  # the normal quantile of 1 - 1e-5
    critical = degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3
    return float(((c - e) ** 2 / e).sum()), critical


CASES = {
    "temperature 1": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 3": {"temperature": 3.0},
    "top_k 5": {"top_k": 5},
    "top_k above the vocabulary": {"top_k": 1000},
    "top_p 0.7": {"top_p": 0.7},
    "top_p 0.05": {"top_p": 0.05},
    "min_p 0.1": {"min_p": 0.1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.8},
    "negative penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_penalty below 1": {"repetition_penalty": 0.6},
    "logit_bias": {"logit_bias": {1: 4.0, 7: -100.0, 20: 2.5}},
    "top_k then top_p": {"top_k": 8, "top_p": 0.8},
    "all at once": {
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {4: 1.0, 9: -1.0},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name):
    logits, params = logits_of(len(name)), SamplingParams(**CASES[name])
    statistic, critical = chi_square(counts_of(logits, params), exact(logits, params))
    assert statistic < critical


def test_the_test_can_tell_a_neighbouring_distribution():
    logits = logits_of(1)
    counts = counts_of(logits, SamplingParams(temperature=1.0))
    statistic, critical = chi_square(counts, exact(logits, SamplingParams(temperature=1.08)))
    assert statistic > critical


def test_end_tokens_are_banned_before_min_tokens_and_only_then():
    logits = logits_of(2)
    logits[list(END_IDS)] += 4
    params = SamplingParams(min_tokens=1)
    statistic, critical = chi_square(
        counts_of(logits, params, ban_until=10**6), exact(logits, params, banned=END_IDS)
    )
    assert statistic < critical
    statistic, critical = chi_square(counts_of(logits, params, ban_until=0), exact(logits, params))
    assert statistic < critical


def test_a_draw_depends_on_its_own_seed_and_position_only():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (8, VOCAB)).astype(np.float32))
    params = SamplingParams(top_p=0.95)
    seeds = np.arange(8, dtype=np.uint64) + np.uint64(5)
    together = np.asarray(choose(logits, rows_of(params, seeds, 17)))
    for i in range(8):
        alone = choose(logits[i : i + 1], rows_of(params, seeds[i : i + 1], 17))
        assert int(alone[0]) == together[i]
    flat = jnp.zeros((64, VOCAB), jnp.float32)
    same = np.full(64, 3, np.uint64)
    assert len(set(np.asarray(choose(flat, rows_of(params, same, 17))).tolist())) == 1
    by_position = [int(choose(flat[:1], rows_of(params, same[:1], p))[0]) for p in range(40)]
    assert len(set(by_position)) > 10


def test_seeds_differ_in_either_half():
    flat = jnp.zeros((64, VOCAB), jnp.float32)
    params = SamplingParams()
    low = np.asarray(choose(flat, rows_of(params, np.arange(64, dtype=np.uint64), 0)))
    high = np.asarray(choose(flat, rows_of(params, np.arange(64, dtype=np.uint64) << np.uint64(32), 0)))
    assert len(set(low.tolist())) > 15
    assert len(set(high.tolist())) > 15
    assert (low != high).any()


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be():
    # Probability 2^-13 each for 8 tokens: the noise's tail must be right, not only its bulk.
    logits = np.zeros(VOCAB, np.float32)
    logits[:8] = math.log(2**-13 * (VOCAB - 8))
    counts = counts_of(logits, SamplingParams())
    p = exact(logits, SamplingParams())[:8].sum()
    n = counts.sum()
    assert abs(counts[:8].sum() - n * p) < 5 * math.sqrt(n * p)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000])
def test_largest_is_the_first_maximum(vocab):
    values = np.random.default_rng(vocab).integers(0, 5, (6, vocab)).astype(np.float32)
    values[0] = -np.inf
    assert np.asarray(largest(jnp.asarray(values))).tolist() == values.argmax(axis=1).tolist()


def test_greedy_rows_beside_sampled_ones_stay_greedy():
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 1, (4, VOCAB)).astype(np.float32))
    hot = rows_of(SamplingParams(temperature=5.0), np.arange(4, dtype=np.uint64), 1)
    mixed = hot._replace(
        features=hot.features.at[2].set(features.of(SamplingParams(temperature=0))),
        temperature=hot.temperature.at[2].set(0.0),
    )
    assert int(choose(logits, mixed)[2]) == int(np.asarray(logits)[2].argmax())
