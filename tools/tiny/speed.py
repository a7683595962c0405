"""How many steps fit in a time: measured by taking a few steps of every phase before the run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from tools.tiny.model import TinyConfig, init_params
from tools.tiny.pipeline import batches
from tools.tiny.train import Phase, Recipe, make_optimizer, make_step

_TIMED_STEPS = 5


def seconds_per_step(
    config: TinyConfig, recipe: Recipe, phase: Phase, tokenizer_folder: Path, teacher: TinyConfig | None
) -> float:
    """Returns the mean time of one step of a phase, compilation not counted."""
    step = make_step(
        config, recipe, None if teacher is None else (teacher, init_params(teacher, recipe.seed))
    )
    params = init_params(config, recipe.seed)
    state = (params, make_optimizer(recipe).init(params))
    rows = batches(tokenizer_folder, recipe.seed, phase.length, phase.batch)
    state, loss = step(state, next(rows))
    loss.block_until_ready()
    began = time.monotonic()
    for _ in range(_TIMED_STEPS):
        state, loss = step(state, next(rows))
    loss.block_until_ready()
    return (time.monotonic() - began) / _TIMED_STEPS


def steps_within(
    config: TinyConfig,
    recipe: Recipe,
    tokenizer_folder: Path,
    seconds: float,
    teacher: TinyConfig | None = None,
) -> int:
    """Returns how many steps of the recipe take about `seconds` on this machine as it is now, at least one."""
    recipe = dataclasses.replace(recipe, steps=1000)  # the optimizer's schedule wants a length; any will do
    mean = sum(
        phase.share * seconds_per_step(config, recipe, phase, tokenizer_folder, teacher)
        for phase in recipe.phases
    )
    return max(1, int(seconds / mean))
