"""jinfer beside transformers: logits per position, and greedy tokens in every way that a request can be computed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jinfer import ConfigError, Engine, EngineConfig, SamplingParams, forward, load_params
from jinfer.errors import ModelError
from jinfer.models.hf_config import ModelConfig, read_config
from jinfer.models.loading import make_spec
from jinfer.programs import compiler_options
from jinfer.text import ChatTemplate, Tokenizer
from tools.verify_model.reference import Reference, margin, relative_error

# Small steps, so that a prompt is computed in chunks, several pages each.
ENGINE: dict[str, Any] = {
    "block_size": 8,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Settings:
    """What is compared.

    tolerance: largest deviation of a logit, as a share of its row's largest magnitude. Where greedy tokens differ and
    the two best logits are closer than that, either is right.
    threads: engines at once, each with its own copy of the model.
    optimization_level: of jinfer's programs; None: as they are served.
    """

    prompt_lengths: tuple[int, ...] = (1, 17, 300)
    new_tokens: int = 48
    tensor_parallel_sizes: tuple[int, ...] = (1,)
    tolerance: float = 1e-4
    seed: int = 0
    threads: int = 1
    optimization_level: int | None = None


@dataclass(frozen=True)
class Check:
    """One comparison and its outcome."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All comparisons of one model."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

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
    """Prompts of the settings' lengths, cut where the model's context leaves no room for the new tokens.

    Raises:
      ConfigError: there is room for no prompt at all.
    """
    random = np.random.default_rng(settings.seed)
    room = longest - settings.new_tokens
    if room < 1:
        raise ConfigError(
            f"{settings.new_tokens} new tokens leave no room for a prompt, the model's context has {longest}: "
            "ask for fewer"
        )
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
    tokens of each prompt alone, and of all together with their prefixes cached; on several devices of all together,
    at first and with their prefixes cached.

    Args:
      reference, expected: if they were made before.

    Raises:
      ValueError: a UserError of jinfer's: the folder, its config or its weights cannot be used.
    """
    settings = settings or Settings()
    folder = folder.resolve()
    # What jinfer refuses is told in its own words, before transformers meets it.
    config = _check(folder, settings)
    if expected is None:
        prompts = random_prompts(settings, config.vocab_size, config.max_position_embeddings)
    else:
        prompts = {len(one.prompt): one.prompt for one in expected.values()}
    longest = prompts[max(prompts)]
    params = load_params(str(folder), dtype="float32", layer_loop="scan")
    lowered = jax.jit(forward).lower(params, jnp.asarray(longest))
    options = compiler_options(settings.optimization_level, is_cpu=True)
    actual = np.asarray(lowered.compile(compiler_options=options)(params, jnp.asarray(longest)))
    del params  # the reference takes as much memory

    reference = reference or Reference(folder)
    expected = expected or expectations(reference, prompts, settings.new_tokens)
    logits = _compare_logits(actual, reference.logits(longest), settings.tolerance)
    with ThreadPoolExecutor(settings.threads) as pool:
        compare = functools.partial(_compare_tokens, folder, expected, settings)
        return Report(
            [logits, *(c for checks in pool.map(compare, settings.tensor_parallel_sizes) for c in checks)]
        )


def _check(folder: Path, settings: Settings) -> ModelConfig:
    """Everything about the folder that can be refused without reading its weights."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give the one with config.json, weights and tokenizer")
    config = read_config(folder)
    for size in settings.tensor_parallel_sizes:
        make_spec(config, EngineConfig(model=str(folder), tensor_parallel_size=size), "cpu")
    Tokenizer.from_folder(folder)
    ChatTemplate.from_folder(folder)
    return config


def _compare_logits(actual: np.ndarray, wanted: np.ndarray, tolerance: float) -> Check:
    """float32[S, V] each, of a prompt of S tokens."""
    error = relative_error(actual, wanted)
    detail = f"largest deviation {error:.1e} of {tolerance:.0e}"
    return Check(f"logits, prompt of {len(wanted)}", error < tolerance, detail)


def _compare_tokens(
    folder: Path, expected: Mapping[str, Expected], settings: Settings, devices: int
) -> list[Check]:
    longest = max(len(one.prompt) for one in expected.values()) + settings.new_tokens
    # Layers are unrolled on one device and scanned on several, and chunks are of two sizes, so that all is seen.
    loop, chunk = ("unroll", 16) if devices == 1 else ("scan", 32)
    options = {
        **ENGINE,
        "max_num_seqs": max(len(expected), 2),
        "max_num_batched_tokens": chunk,
        "max_model_len": longest,
        "tensor_parallel_size": devices,
        "layer_loop": loop,
        "optimization_level": settings.optimization_level,
        # One device meets every step program, so they may be compiled side by side; several meet fewer.
        "warmup": devices == 1,
    }
    engine = Engine(EngineConfig(model=str(folder), **options))
    # The longest first: the others then join its last chunk, and all end in the same step, in few programs.
    together = dict(sorted(expected.items(), key=lambda item: -len(item[1].prompt)))
    where = f" on {devices} devices" if devices > 1 else ""
    checks: list[Check] = []
    if devices > 1:
        checks += _compare_run(engine, together, f"together{where}", settings)[0]
    else:
        for name, one in expected.items():
            checks += _compare_run(engine, {name: one}, "alone", settings)[0]
    more, cached = _compare_run(engine, together, f"together, prefixes cached{where}", settings)
    checks += more
    pages = (max(len(one.prompt) for one in expected.values()) - 1) // options["block_size"]
    if pages and engine.model_config.fixed_angles_length is None:
        checks.append(Check(f"prefix cache{where}", cached > 0, f"{cached} prompt tokens were found in it"))
    return checks


def _compare_run(
    engine: Engine, expected: Mapping[str, Expected], how: str, settings: Settings
) -> tuple[list[Check], int]:
    """Runs the prompts at once: their comparisons, and how many prompt tokens came from the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=settings.new_tokens, ignore_eos=True)
    for name, one in expected.items():
        engine.add_request(name, one.prompt, params)
    tokens: dict[str, list[int]] = {name: [] for name in expected}
    cached: dict[str, int] = {}
    for delta in engine.drain():
        tokens[delta.request_id] += delta.token_ids
        cached[delta.request_id] = delta.num_cached_tokens
    checks = [
        Check(f"greedy, {name}, {how}", *_judge(tokens[name], one, settings.tolerance))
        for name, one in expected.items()
    ]
    return checks, sum(cached.values())


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
