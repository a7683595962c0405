"""Rows of the table for a TPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tools.kernel_cases import Case
from tools.kernel_report.bundles import GRANULE_BYTES, Region, read_kernel
from tools.kernel_report.cost import Cost, cost_of
from tools.targets import TPUTarget, run_child

DECODE_TOKENS = 1024
PREFILL_QUERIES, PREFILL_TOKENS = 128, 512

COLUMNS = (
    "kernel",
    "by",
    "bundles per pass",
    "with every branch",
    "KV tokens fetched",
    "fetch cycles",
    "compute / fetch",
    "fetches ahead",
    f"bundles per {DECODE_TOKENS:,} KV tokens",
    f"bundles per {PREFILL_QUERIES} x {PREFILL_TOKENS}",
    "MXU busy",
    "VALU",
    "EUP",
    "spills per bundle",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class Row:
    case: Case
    kernel: str
    cost: Cost


def measure(case: Case, target: TPUTarget, folder: Path, *, loops: bool = False) -> list[Row]:
    """Compiles the case and reads the kernel that does its work: the one with the most matrix work."""
    answer = run_child("tools.kernel_report.child", target, {"case": case.as_request()}, dump=folder)
    if not answer["kernels"]:
        raise ValueError("the program holds no kernel: XLA compiled it alone")
    rows: list[Row] = []
    busiest = 0
    for kernel in answer["kernels"]:
        root, utilization = read_kernel(folder, kernel)
        if loops:
            print(f"{target.name} {case.name} ({case.implementation}), {kernel}", file=sys.stderr)
            print(loop_tree(root), file=sys.stderr)
        if root.total("matmul_rows") > busiest:
            busiest = root.total("matmul_rows")
            rows = [Row(case, kernel, cost_of(root, utilization, case, target))]
    return rows


def loop_tree(region: Region, indent: str = "") -> str:
    spills = sum(count for unit, count in region.units_total().items() if ":" in unit)
    line = (
        f"{indent}{'loop' if region.is_loop else 'branch'} at {region.start:#x}: {region.bundles} bundles of its own, "
        f"{region.total('bundles')} in all; {region.fetches} fetches of "
        f"{region.fetched_granules * GRANULE_BYTES:,} bytes, {region.waits} waits, {region.stores} stores, "
        f"{region.total('matmul_rows')} matmul rows, {spills} spills and refills"
    )
    return "\n".join([line, *(loop_tree(inner, indent + "  ") for inner in region.inner)])


def table(rows: list[Row]) -> str:
    return "\n".join([HEADER, *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    cost, case = row.cost, row.case
    decode = case.phase == "decode"
    block = PREFILL_QUERIES * PREFILL_TOKENS * case.heads.heads
    cells = [
        case.name,
        case.implementation,
        f"{cost.bundles:,}",
        f"{cost.all_bundles:,}",
        _number(cost.tokens),
        _number(cost.fetch_cycles or None),
        _ratio(cost.over_fetch),
        {True: "yes", False: "no", None: ""}[cost.in_flight],
        _number(cost.per_tokens(DECODE_TOKENS) if decode else None),
        _number(None if decode else cost.per_pairs(block)),
        f"{cost.mxu_share:.0%}",
        f"{cost.units.get('VALU', 0):.0%}",
        f"{cost.units.get('EUP', 0):.0%}",
        f"{cost.spills:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
