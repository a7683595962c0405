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

__all__ = ["TARGETS", "ChildError", "GPUTarget", "TPUTarget", "Target", "find", "run_child"]

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


def run_child(
    module: str, target: Target, request: dict[str, Any], *, dump: Path | None = None, timeout: float = 1800
) -> Any:
    """Runs `python -m module` in a process set up for the target: JSON request on stdin, JSON answer on stdout.

    Args:
      dump: a folder for the compiler's own notes on what it made.
      timeout: seconds.

    Raises:
      ChildError: it failed, died (some compilers abort the process) or did not end in time.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_", "XLA_", "TPU_", "LIBTPU_", "MOSAIC_"))
    }
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    }
    environment |= target.environment(dump)
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps({"target": target.name, **request}),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"did not end within {timeout:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ChildError(f"exit status {done.returncode}: {_last_words(done.stderr)}")
    return json.loads(lines[-1])


def _last_words(stderr: str, lines: int = 6) -> str:
    """The lines of a failed process that say why: its last ones, or those with an error in them."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in said if "rror" in line or "fatal" in line.lower() or "Check failed" in line]
    return " / ".join((telling or said)[-lines:])[-1500:] or "it said nothing"
