"""jinfer beside transformers: logits per position, and greedy tokens in every way that a request can be computed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jinfer import Engine, EngineConfig, SamplingParams, forward, load_params
from tools.verify_model.reference import Reference, margin, relative_error

# Small steps, so that a prompt is computed in chunks, several pages each.
ENGINE: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "dtype": "float32",
    "warmup": False,
}


@dataclass(frozen=True)
class Settings:
    """What is compared.

    tolerance: largest deviation of a logit, as a share of its row's largest magnitude. Where greedy tokens differ and
    the two best logits are closer than that, either is right.
    """

    prompt_lengths: tuple[int, ...] = (1, 17, 300)
    new_tokens: int = 48
    tensor_parallel_sizes: tuple[int, ...] = (1,)
    tolerance: float = 1e-4
    seed: int = 0


@dataclass(frozen=True)
class Check:
    """One comparison and its outcome."""

    name: str
    passed: bool
    detail: str


@dataclass
class Report:
    """All comparisons of one model."""

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def add(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append(Check(name, passed, detail))

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{c.name:{width}}  {'ok  ' if c.passed else 'FAIL'}  {c.detail}" for c in self.checks]
        return "\n".join([*lines, f"verdict: {'equal' if self.passed else 'NOT equal'}"])


@dataclass(frozen=True)
class Expected:
    """What the reference makes of one prompt."""

    prompt: list[int]
    tokens: list[int]
    logits: np.ndarray  # float32[new tokens, V]


def random_prompts(settings: Settings, vocab_size: int, longest: int) -> dict[int, list[int]]:
    """Prompts of the settings' lengths, cut where the model's context leaves no room for the new tokens."""
    random = np.random.default_rng(settings.seed)
    room = longest - settings.new_tokens
    lengths = dict.fromkeys(min(length, room) for length in settings.prompt_lengths)
    return {length: random.integers(0, vocab_size, length).tolist() for length in lengths}


def expectations(
    reference: Reference, prompts: Mapping[int, Sequence[int]], count: int
) -> dict[str, Expected]:
    """Greedy continuations by prompt, from the reference."""
    return {
        f"prompt of {length}": Expected(list(prompt), *reference.greedy(prompt, count))
        for length, prompt in prompts.items()
    }


def verify_model(
    folder: Path,
    settings: Settings | None = None,
    *,
    reference: Reference | None = None,
    expected: Mapping[str, Expected] | None = None,
) -> Report:
    """Compares a model folder in jinfer with transformers: logits per position of the longest prompt, then greedy
    tokens of each prompt alone, of all together with their prefixes cached, and of all together on several devices.

    Args:
      reference, expected: if they were made before.

    Raises:
      ValueError: a UserError of jinfer's: the folder, its config or its weights cannot be used.
    """
    settings = settings or Settings()
    reference = reference or Reference(folder)
    config = reference.model.config
    if expected is None:
        prompts = random_prompts(settings, config.vocab_size, config.max_position_embeddings)
        expected = expectations(reference, prompts, settings.new_tokens)
    report = Report()
    _compare_logits(report, folder, reference, expected, settings)
    for size in settings.tensor_parallel_sizes:
        _compare_tokens(report, folder, expected, settings, size)
    return report


def _compare_logits(
    report: Report, folder: Path, reference: Reference, expected: Mapping[str, Expected], settings: Settings
) -> None:
    name, longest = max(expected.items(), key=lambda item: len(item[1].prompt))
    params = load_params(str(folder), dtype="float32", layer_loop="scan")
    actual = np.asarray(jax.jit(forward)(params, jnp.asarray(longest.prompt)))
    error = relative_error(actual, reference.logits(longest.prompt))
    detail = f"largest deviation {error:.1e} of {settings.tolerance:.0e}"
    report.add(f"logits, {name}", error < settings.tolerance, detail)


def _compare_tokens(
    report: Report, folder: Path, expected: Mapping[str, Expected], settings: Settings, devices: int
) -> None:
    longest = max(len(e.prompt) for e in expected.values()) + settings.new_tokens
    # Layers are unrolled on one device and scanned on several, so that both are seen.
    loop = "unroll" if devices == 1 else "scan"
    options = {**ENGINE, "max_model_len": longest, "tensor_parallel_size": devices, "layer_loop": loop}
    engine = Engine(EngineConfig(model=str(folder), **options))
    compare = functools.partial(_compare_run, report, engine, settings=settings)
    if devices > 1:
        compare(expected, f"together on {devices} devices")
        return
    for name, one in expected.items():
        compare({name: one}, "alone")
    cached = compare(expected, "together, prefixes cached")
    pages = (max(len(e.prompt) for e in expected.values()) - 1) // options["block_size"]
    if pages and engine.model_config.fixed_angles_length is None:
        report.add("prefix cache", cached > 0, f"{cached} prompt tokens were found in it")


def _compare_run(
    report: Report, engine: Engine, expected: Mapping[str, Expected], how: str, *, settings: Settings
) -> int:
    """Runs the prompts at once and compares; returns how many prompt tokens came from the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=settings.new_tokens, ignore_eos=True)
    for name, one in expected.items():
        engine.add_request(name, one.prompt, params)
    tokens: dict[str, list[int]] = {name: [] for name in expected}
    cached: dict[str, int] = {}
    for delta in engine.drain():
        tokens[delta.request_id] += delta.token_ids
        cached[delta.request_id] = delta.num_cached_tokens
    for name, one in expected.items():
        passed, detail = _judge(tokens[name], one, settings.tolerance)
        report.add(f"greedy, {name}, {how}", passed, detail)
    return sum(cached.values())


def _judge(actual: Sequence[int], expected: Expected, tolerance: float) -> tuple[bool, str]:
    count = len(expected.tokens)
    first = next((i for i in range(count) if list(actual[i : i + 1]) != expected.tokens[i : i + 1]), None)
    if first is None:
        return True, f"{count} of {count} tokens equal"
    gap = margin(expected.logits[first : first + 1])
    if gap < tolerance:
        return True, f"{first} of {count} tokens equal, then a tie: the two best logits differ by {gap:.1e}"
    return False, (
        f"token {first + 1} of {count} is {actual[first] if first < len(actual) else 'missing'}, "
        f"transformers chose {expected.tokens[first]}, {gap:.1e} ahead of the next"
    )
