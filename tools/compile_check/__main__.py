"""Compiles every kernel, and the engine's step with one inside, for accelerators that are not there.

    python -m tools.compile_check                                 # everything, the whole table
    python -m tools.compile_check kernels --target v6e,H200 --model llama-3-8b
    python -m tools.compile_check step --model llama-3-8b --target v6e --tensor-parallel-size 4

Weights and KV are shapes alone. Exit code 1 if something does not compile or copies KV pages that should be updated
in place, and 2 if a target's compiler is not installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools import targets
from tools.compile_check import kernels
from tools.compile_check.step import Compiled
from tools.kernel_cases import MODELS, models

TARGETS = "v5e,v5p,v6e,tpu7x,H100,H200,B200"
GIB = 1024**3


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.what == "kernels":
        return check_kernels(options)
    if options.what == "step":
        return check_step(options)
    return max(check_kernels(options), check_step(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check", description="Compile for accelerators that are not there."
    )
    parser.set_defaults(target=None, model=None, op=None)
    _add_step_flags(parser, hidden=True)
    what = parser.add_subparsers(dest="what", metavar="{kernels,step}")
    kernel = what.add_parser("kernels", help="every kernel at the shapes of real models")
    kernel.add_argument("--target", help=f"comma separated, of {', '.join(targets.TARGETS)}")
    kernel.add_argument("--model", help=f"comma separated, of {', '.join(models())}")
    kernel.add_argument("--op", help="comma separated, of paged_attention, flash_attention")
    step = what.add_parser("step", help="the engine's step with the kernel inside")
    step.add_argument("--target", help="one of the targets; default v6e")
    step.add_argument("--model", help="folder with a config.json, or a name in configs/models")
    _add_step_flags(step)
    return parser


def _add_step_flags(parser: argparse.ArgumentParser, *, hidden: bool = False) -> None:
    flags = {
        "--tensor-parallel-size": (4, "devices"),
        "--rows": (64, "running sequences"),
        "--tokens": (512, "tokens of the mixed step"),
        "--context": (2048, "tokens per sequence"),
    }
    for flag, (default, text) in flags.items():
        if hidden:
            parser.set_defaults(**{flag.strip("-").replace("-", "_"): default})
        else:
            parser.add_argument(flag, type=int, default=default, help=text)
    if hidden:
        parser.set_defaults(attention_backend=None)
    else:
        parser.add_argument(
            "--attention-backend", choices=("xla", "tpu", "gpu"), help="default: the target's kernel"
        )


def check_kernels(options: argparse.Namespace) -> int:
    chosen = [targets.find(name) for name in (options.target or TARGETS).split(",")]
    names = options.model.split(",") if options.model else models()
    unknown = sorted(set(names) - set(models()))
    if unknown:
        print(f"unknown models {unknown}: use some of {models()}", file=sys.stderr)
        return 1
    status = 0
    print(kernels.HEADER, flush=True)
    for target in chosen:
        reason = target.missing()
        if reason is not None:
            print(kernels.missing_line(target, reason), flush=True)
            status = max(status, 2) if status != 1 else 1
            continue
        for result in kernels.check(target, kernels.cases(target, names, options.op)):
            print(kernels.line(result), flush=True)
            status = status if result.passed else 1
    return status


def check_step(options: argparse.Namespace) -> int:
    target = targets.find(options.target or "v6e")
    model = options.model or "llama-3-8b"
    folder = Path(model) if Path(model).is_dir() else MODELS / model
    backend = options.attention_backend or target.kind
    tensor = options.tensor_parallel_size
    reason = target.missing()
    if reason is not None:
        print(f"{target.name}: {reason}", file=sys.stderr)
        return 2
    if tensor > target.max_devices:
        print(
            f"--tensor-parallel-size is {tensor}: {target.name} is described with {target.max_devices} devices"
        )
        return 1
    step = {
        "folder": str(folder.resolve()),
        "tensor": tensor,
        "rows": options.rows,
        "tokens": options.tokens,
        "context": options.context,
        "attention": backend,
    }
    answers, error = targets.ask_child("tools.compile_check.child", target, {"step": step})
    if error is not None:
        print(f"{folder.name} does not compile for {target.name}: {error}", file=sys.stderr)
        return 1
    results = [Compiled(**answer) for answer in answers]
    print(
        f"\n{folder.name} on {target.name}, {tensor} devices, {options.rows} rows of {options.context} tokens,"
    )
    print(f"attention {backend!r}; bytes per device\n")
    print(step_table(results))
    if not all(result.kv_is_aliased for result in results):
        print("\nKV is copied: less is aliased than the KV pages take", file=sys.stderr)
        return 1
    return 0


def step_table(results: list[Compiled]) -> str:
    """Markdown, bytes per device."""
    lines = [
        "| program | compile s | arguments GiB | KV GiB | aliased GiB | temporaries MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.program} | {r.seconds:.1f} | {r.argument_bytes / GIB:.3f} | {r.kv_bytes / GIB:.3f} "
        f"| {r.alias_bytes / GIB:.3f} | {r.temp_bytes / 1e6:.1f} |"
        for r in results
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
