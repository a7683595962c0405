"""`python -m tools.verify_model DIR`: is this checkpoint computed as transformers computes it?

Loads the folder in jinfer and in transformers (CPU, float32), compares logits per position and greedy tokens, prints
each comparison and a verdict. Exit status: 0 equal, 1 not equal, 2 they could not be compared.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jinfer import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify_model",
        description="Compare a checkpoint in jinfer with transformers, on the CPU in float32.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder with config.json, weights, tokenizer"
    )
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[1, 17, 300], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=48, help="greedy tokens per prompt")
    parser.add_argument("--tensor-parallel-sizes", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="of a logit, as a share of its row's largest"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    options = parser.parse_args(arguments)
    sizes = (*options.prompt_lengths, options.new_tokens, *options.tensor_parallel_sizes)
    if min(sizes) < 1:
        parser.error("lengths and sizes must be at least 1")
    if not 0 < options.tolerance < math.inf:
        parser.error(f"--tolerance is {options.tolerance}, expected a positive number")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}, expected 0 or more")
    logging.basicConfig(level=logging.WARNING)
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

    import jax

    jax.config.update("jax_num_cpu_devices", max(options.tensor_parallel_sizes))
    from tools.verify_model.compare import Settings, verify_model

    settings = Settings(
        prompt_lengths=tuple(options.prompt_lengths),
        new_tokens=options.new_tokens,
        tensor_parallel_sizes=tuple(options.tensor_parallel_sizes),
        tolerance=options.tolerance,
        seed=options.seed,
    )
    try:
        report = verify_model(options.folder, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Status 1, which Python would end with, is a verdict.
        traceback.print_exc()
        return 2
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
