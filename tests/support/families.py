"""A random-weight model of any family through every check of `tools.verify_model`."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_model, reference
from tools.verify_model.compare import Expected, Report, Settings, expectations, random_prompts, verify_model
from tools.verify_model.reference import margin

SETTINGS = Settings(
    prompt_lengths=(1, 17, 300),
    new_tokens=48,
    tensor_parallel_sizes=(1, 2, 4),
    threads=2,
    optimization_level=0,
)


def settings_of(number: int, config: pytest.Config) -> Settings:
    """For a family's configuration of that number: on one, two or four devices in turn.

    Compiling is nearly all of a test's time. `pytest --all-devices` takes each configuration to all of them.
    """
    sizes = SETTINGS.tensor_parallel_sizes
    return (
        SETTINGS
        if config.getoption("all_devices")
        else replace(SETTINGS, tensor_parallel_sizes=sizes[number % 3 :][:1])
    )


# Twice the largest deviation that is allowed, some hundred times what float32 leaves between the two.
CLEAR_MARGIN = 2e-4
VARIETY = 12
SEEDS = 20


def clear_model(
    model_type: str, root: Path, settings: Settings = SETTINGS, **config: Any
) -> tuple[Path, dict[str, Expected]]:
    """A folder and what transformers generates with it: the first seed whose choices are neither near ties nor the
    same few tokens again and again, which would say little about the layers before."""
    for seed in range(SEEDS):
        folder = make_model(model_type, root / str(seed), **{"seed": seed, **config})
        oracle = reference(folder)
        prompts = random_prompts(settings, 256, oracle.model.config.max_position_embeddings)
        expected: dict[str, Expected] = {}
        for length, prompt in sorted(
            prompts.items()
        ):  # the quickest first: a seed that fails mostly fails there
            expected |= expectations(oracle, {length: prompt}, settings.new_tokens)
            if min(margin(one.logits) for one in expected.values()) <= CLEAR_MARGIN:
                break
        else:
            if len({t for one in expected.values() for t in one.tokens}) > VARIETY:
                return folder, expected
    raise AssertionError(f"no seed below {SEEDS} gives clear and varied choices: try other weights")


def check_family(model_type: str, root: Path, settings: Settings = SETTINGS, **config: Any) -> Report:
    """Makes a random-weight model and asserts that jinfer computes it as transformers does, in every way."""
    folder, expected = clear_model(model_type, root, settings, **config)
    report = verify_model(folder, settings, reference=reference(folder), expected=expected)
    gc.collect()  # an engine is part of a cycle, and its programs take some 50 MB
    assert report.passed, f"{model_type} {config}\n{report}"
    return report
