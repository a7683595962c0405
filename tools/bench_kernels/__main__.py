"""Times every kernel on the accelerator at hand, against its limits and against jax's own.

    python -m tools.bench_kernels [--case decode] [--output table.md]

The limits are measured first, in the same run: the bandwidth of a copy and the rate of a large bf16 matmul. A kernel's
limit is the larger of what its bytes take at the one and its operations at the other. Needs a TPU or a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.kernel_cases import Case

HEADER = (
    "| kernel | microseconds | limit | share of it | jax's own | microseconds | ours is faster by |\n"
    "|---|---|---|---|---|---|---|"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_kernels", description="Time the kernels.")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)

    import jax

    from pallas_kernels.dispatch import current_platform

    platform = current_platform()
    if platform not in ("tpu", "gpu"):
        print(
            f"this needs a TPU or a GPU, and jax found {jax.devices()[0].device_kind!r}: run it where one is, with "
            "jinfer's tpu or gpu extra installed. What can be known without one: python -m tools.kernel_report",
            file=sys.stderr,
        )
        return 2
    text, failed = report(platform, options.case)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    return 1 if failed else 0


def report(platform: str, wanted: str) -> tuple[str, int]:
    """The table as Markdown, and how many of our own kernels failed."""
    import jax

    from tools.bench_kernels.timing import copy_bandwidth, matmul_rate
    from tools.bench_kernels.work import cases

    bandwidth, rate = copy_bandwidth(), matmul_rate()
    lines = [
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: a copy moves {bandwidth / 1e9:,.0f} GB/s, "
        f"a bf16 matmul does {rate / 1e12:,.0f} TFLOP/s.\n",
        HEADER,
    ]
    failed = 0
    for case in cases(platform):
        if wanted in case.name:
            line, passed = measure(case, bandwidth, rate)
            lines.append(line)
            failed += not passed
    return "\n".join(lines), failed


def measure(case: Case, bandwidth: float, rate: float) -> tuple[str, bool]:
    """One line of the table, and whether our kernel ran."""
    from tools.bench_kernels.timing import seconds_per_step
    from tools.bench_kernels.work import alternative, least, make

    limit, kind = least(case).seconds(bandwidth, rate)
    name = f"{case.name}, {case.rows} x {case.context}"
    try:
        work = make(case)
        ours = seconds_per_step(work.step, work.carry, constants=work.constants)
    except Exception as error:  # one kernel that fails must not hide the others' figures
        return f"| {name} | failed: {_short(error)} | | | | | |", False
    cells = [name, f"{ours * 1e6:,.0f}", f"{limit * 1e6:,.0f} us, {kind}", f"{limit / ours:.0%}"]
    try:
        other, work = alternative(case)
        theirs = seconds_per_step(work.step, work.carry, constants=work.constants)
        cells += [other, f"{theirs * 1e6:,.0f}", f"{theirs / ours:.2f}"]
    except Exception as error:  # theirs: whatever it raises, it has no figure here
        cells += [_short(error), "", ""]
    return f"| {' | '.join(cells)} |", True


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120].replace("|", "/")


if __name__ == "__main__":
    raise SystemExit(main())
