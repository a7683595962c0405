"""Accelerators to compile for that need not be there: what their compilers want to know, and their speeds.

A target is named as people name the chip: `v6e`, `tpu7x`, `H200`. Compilers read their environment once, so a process
serves one target: set `environment()` before jax is imported, best through `run_child`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.targets.gpu import GPU_TARGETS, GPUTarget
from tools.targets.tpu import TPU_TARGETS, TPUTarget

__all__ = [
    "GPU_TARGETS",
    "TARGETS",
    "TPU_TARGETS",
    "ChildError",
    "GPUTarget",
    "TPUTarget",
    "Target",
    "ask_child",
    "find",
    "run_child",
]

Target = TPUTarget | GPUTarget
TARGETS: dict[str, Target] = {target.name: target for target in (*TPU_TARGETS, *GPU_TARGETS)}
ROOT = Path(__file__).resolve().parents[2]


class ChildError(RuntimeError):
    """The process that compiled for a target failed; the message holds the end of what it said."""


def find(name: str) -> Target:
    """The target of that name, in any case.

    Raises:
      ValueError: there is none.
    """
    for known, target in TARGETS.items():
        if known.lower() == name.lower():
            return target
    raise ValueError(f"unknown target {name!r}: use one of {', '.join(TARGETS)}")


def ask_child(
    module: str, target: Target, request: dict[str, Any], *, dump: Path | None = None, timeout: float = 1800
) -> tuple[list[Any], str | None]:
    """Runs `python -m module` in a process set up for the target.

    The request goes to its stdin as JSON; it answers with lines of JSON on stdout.

    Args:
      dump: a folder for the compiler's own notes on what it made.
      timeout: seconds.

    Returns:
      The answers, and None or why it failed: some compilers abort the process, and what was answered until then counts.
    """
    dropped = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "MOSAIC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    paths = [path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path]
    environment = kept | {"PYTHONPATH": os.pathsep.join(paths)} | target.environment(dump)
    request = {"target": target.name, **request}
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        try:
            out, said = process.communicate(json.dumps(request), timeout=timeout)
            reason = f"exit status {process.returncode}: {_last_words(said)}" if process.returncode else None
        except subprocess.TimeoutExpired:
            process.kill()
            out, said = process.communicate()
            reason = f"did not end within {timeout:.0f} s"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], reason


def run_child(
    module: str, target: Target, request: dict[str, Any], *, dump: Path | None = None, timeout: float = 1800
) -> Any:
    """`ask_child` for one answer.

    Raises:
      ChildError: there was none.
    """
    answers, reason = ask_child(module, target, request, dump=dump, timeout=timeout)
    if reason is not None or not answers:
        raise ChildError(reason or "it answered nothing")
    return answers[-1]


def _last_words(stderr: str, lines: int = 6) -> str:
    """The lines of a failed process that say why: its last ones, or those with an error in them."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in said if "rror" in line or "fatal" in line.lower() or "Check failed" in line]
    return " / ".join((telling or said)[-lines:])[-1500:] or "it said nothing"
