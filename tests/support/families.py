"""A random-weight model of any family through every check of `tools.verify_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.models import make_model, reference
from tools.verify_model.compare import Expected, Report, Settings, expectations, random_prompts, verify_model
from tools.verify_model.reference import margin

SETTINGS = Settings(prompt_lengths=(1, 17, 300), new_tokens=48, tensor_parallel_sizes=(2, 4, 1), threads=2)
# Twice the largest deviation that is allowed, some hundred times what float32 leaves between the two.
CLEAR_MARGIN = 2e-4
SEEDS = 20


def clear_model(
    model_type: str, root: Path, settings: Settings = SETTINGS, **config: Any
) -> tuple[Path, dict[str, Expected]]:
    """A folder whose greedy choices are no near ties, and what transformers generates: the first seed that gives one."""
    for seed in range(SEEDS):
        folder = make_model(model_type, root / str(seed), **{"seed": seed, **config})
        oracle = reference(folder)
        prompts = random_prompts(settings, 256, oracle.model.config.max_position_embeddings)
        expected = expectations(oracle, prompts, settings.new_tokens)
        if min(margin(one.logits) for one in expected.values()) > CLEAR_MARGIN:
            return folder, expected
    raise AssertionError(f"no seed below {SEEDS} gives clear choices: make the weights larger")


def check_family(model_type: str, root: Path, settings: Settings = SETTINGS, **config: Any) -> Report:
    """Makes a random-weight model and asserts that jinfer computes it as transformers does, in every way."""
    folder, expected = clear_model(model_type, root, settings, **config)
    # Greedy choices that repeat one token say little about the layers before.
    assert len({token for one in expected.values() for token in one.tokens}) > 8
    report = verify_model(folder, settings, reference=reference(folder), expected=expected)
    assert report.passed, f"{model_type} {config}\n{report}"
    return report
