"""Rows of the table for a GPU: what ptxas and the disassembler say of a Mosaic GPU kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tools.kernel_cases import Case
from tools.targets import GPUTarget, run_child

HEADER = (
    "| case | kernel | registers | spilled bytes | shared memory bytes | HGMMA | UTMALDG | UTMASTG |\n"
    "|---|---|---|---|---|---|---|---|"
)
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")  # in the log of Mosaic's passes


@dataclass(frozen=True)
class Row:
    """One kernel. `spilled_bytes` must be 0 in a hot kernel; instruction counts are of the text, not of a run."""

    case: Case
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int | None
    hgmma: int
    tma_loads: int
    tma_stores: int


def measure(case: Case, target: GPUTarget, folder: Path) -> list[Row]:
    """Compiles the case and reads every kernel that Mosaic dumped."""
    run_child("tools.kernel_report.child", target, {"case": case.as_request()}, dump=folder)
    rows = [read_dump(case, file) for file in sorted(folder.glob("*.ptxas"))]
    if case.phase == "mixed":  # its decode rows' kernels are the decode case's
        rows = [row for row in rows if not row.kernel.endswith(("_decode", "_join"))]
    if not rows:
        raise ValueError("no Mosaic GPU kernel was dumped: XLA compiled it alone")
    return rows


def read_dump(case: Case, ptxas: Path) -> Row:
    """Reads `NAME.ptxas` and the files beside it."""
    said = ptxas.read_text()
    registers = [int(count) for count in _REGISTERS.findall(said)]
    spills = [int(stores) + int(loads) for stores, loads in _SPILLS.findall(said)]
    if not registers:
        raise ValueError(
            f"{ptxas.name} names no registers: the compiler's format is not the one this was written for"
        )
    beside = [file for file in sorted(ptxas.parent.glob(f"{ptxas.stem}.*")) if file != ptxas]
    code = "".join(file.read_text() for file in beside if file.suffix.startswith(".sass"))
    if not code:
        raise ValueError(
            f"{ptxas.name} has no disassembly beside it: install nvidia-cuda-nvdisasm and cuobjdump"
        )
    shared = [
        int(size) for file in beside if file.suffix == ".log" for size in _SHARED.findall(file.read_text())
    ]
    return Row(
        case=case,
        kernel=ptxas.stem.rsplit("_", 1)[0],
        registers=max(registers),
        spilled_bytes=sum(spills),
        shared_bytes=max(shared, default=None),
        hgmma=len(re.findall(r"\bHGMMA\b", code)),
        tma_loads=len(re.findall(r"\bUTMALDG\b", code)),
        tma_stores=len(re.findall(r"\bUTMASTG\b", code)),
    )


def table(rows: list[Row]) -> str:
    return "\n".join([HEADER, *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    shared = "" if row.shared_bytes is None else f"{row.shared_bytes:,}"
    cells = [
        row.case.name,
        row.kernel,
        str(row.registers),
        str(row.spilled_bytes),
        shared,
        str(row.hgmma),
        str(row.tma_loads),
        str(row.tma_stores),
    ]
    return f"| {' | '.join(cells)} |"
