"""What sampling should do, in numpy and float64, written from the definitions; and a chi-square test of what it did."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from jinfer import SamplingParams


def adjusted_logits(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    end_ids: Collection[int] = (),
) -> np.ndarray:
    """float64[V]: after the penalties, the bias and the ban of end tokens."""
    x = np.array(logits, np.float64)
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(output):
        x[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(output) < params.min_tokens:
        x[list(end_ids)] = -np.inf
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def exact_probabilities(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    end_ids: Collection[int] = (),
) -> np.ndarray:
    """float64[V]: the distribution of the next token."""
    x = adjusted_logits(logits, params, prompt, output, end_ids)
    if params.temperature == 0:
        return (np.arange(len(x)) == np.argmax(x)).astype(np.float64)
    x = x / params.temperature
    if params.top_k > 0:
        order = np.argsort(-x, kind="stable")
        x[order[params.top_k :]] = -np.inf
    if params.top_p < 1:
        p = softmax(x)
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]  # mass of the more likely ones
        x[order[before >= params.top_p]] = -np.inf
    if params.min_p > 0:
        p = softmax(x)
        x[p < params.min_p * p.max()] = -np.inf
    return softmax(x)


def chi_square_z(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How far drawn counts are from the distribution, in standard deviations of a normal variable.

    Pearson's statistic over bins of at least ten expected draws (rarer outcomes are put together), turned into a
    normal variable by the cube-root transformation of Wilson and Hilferty. Infinite if something impossible was drawn.
    """
    total = counts.sum()
    if counts[probabilities == 0].any():
        return float("inf")
    expected = probabilities * total
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 10:  # the rest is too rare to judge by itself
        observed[-2] += observed[-1]
        wanted[-2] += wanted[-1]
        observed, wanted = observed[:-1], wanted[:-1]
    freedom = len(wanted) - 1
    if freedom == 0:
        return 0.0
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
