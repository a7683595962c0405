"""What a kernel costs, read from what the compiler made of it: no accelerator is needed.

    python -m tools.kernel_report                                        # the whole table
    python -m tools.kernel_report --target v6e --case "decode, llama"    # the rows with that text
    python -m tools.kernel_report --target v6e --case flash --loops      # with every loop of the kernel

For a TPU the figures are libtpu's own final bundles: a loop's bundles are its cycles, with every wait left out. For a
GPU they are ptxas's registers and spills and what stands in the disassembly. jax's own kernels for the same work stand
beside ours. Markdown comes out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tools import targets
from tools.kernel_cases import Case
from tools.kernel_report import gpu, tpu
from tools.kernel_report.cases import default_cases
from tools.targets import ChildError, GPUTarget, TPUTarget


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chosen = [targets.find(name) for name in options.target.split(",")]
    failed = 0
    for target in chosen:
        reason = target.missing()
        if reason is not None:
            print(f"{target.name}: nothing compiled, {reason}", file=sys.stderr)
            failed += 1
            continue
        cases = [case for case in default_cases(target.kind) if _wanted(case, options)]
        failed += _report(target, cases, options)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_report", description="Static cost of kernels."
    )
    parser.add_argument("--target", default="v5e,v6e,tpu7x", help=f"from {', '.join(targets.TARGETS)}")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--implementation", default="", help="only these, comma separated: tpu, gpu, jax")
    parser.add_argument("--loops", action="store_true", help="list every loop of each TPU kernel")
    parser.add_argument("--keep", type=Path, help="keep the compiler's dumps under this folder")
    return parser


def _wanted(case: Case, options: argparse.Namespace) -> bool:
    names = options.implementation.split(",") if options.implementation else [case.implementation]
    return options.case in case.name and case.implementation in names


def _report(target: targets.Target, cases: list[Case], options: argparse.Namespace) -> int:
    """Prints one target's table; returns how many cases failed to compile."""
    rows, failures = [], []
    for case in cases:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if options.keep is not None:
                label = f"{target.name} {case.name} {case.implementation}"
                folder = options.keep / "".join(c if c.isalnum() else "-" for c in label)
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.iterdir():
                    old.unlink()
            try:
                if isinstance(target, TPUTarget):
                    rows += tpu.measure(case, target, folder, loops=options.loops)
                elif isinstance(target, GPUTarget):
                    rows += gpu.measure(case, target, folder)
            except (ChildError, FileNotFoundError, ValueError) as error:
                failures.append(f"{case.name} ({case.implementation}): {error}")
    print(f"### {target.name}\n")
    print((tpu if isinstance(target, TPUTarget) else gpu).table(rows))
    print("".join(f"\n- not compiled: {failure}" for failure in failures))
    return len([failure for failure in failures if "(jax)" not in failure])


if __name__ == "__main__":
    raise SystemExit(main())
