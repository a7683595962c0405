"""Reads what libtpu's compiler dumps about a kernel: its final VLIW bundles and what each of them occupies.

A bundle issues once per cycle at best, so the bundles of a loop are its cycle count with every wait left out. In
`final_bundles.txt` a bundle is a line such as

      0x167 LB: >> { %s1 = sadd.s32 1, %s0  ;;  %v2 = vld [vmem:[%s3]] }

`LB` opens a loop body and the number of `>` is the depth of loops around the bundle; an empty bundle `{}` carries no
such mark and belongs where the bundle before it does. Lines without an address are text of the compiler's checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

GRANULE_BYTES = 32  # what the DMA engine counts in

_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s((?:>\s?)*)\s*\{")
_FETCH = re.compile(r"(?:\{|;;)\s*%\S+ = dma\.hbm_to_vmem .*?/\*size_in_granules=\*/(\d+|%)")
_STORE = re.compile(r"(?:\{|;;)\s*%\S+ = dma\.vmem_to_hbm ")
_WAIT = re.compile(r"(?:\{|;;)\s*%\S+ = dma\.done\.wait ")
_MATMUL = re.compile(r"\bvmatmul\.\w+\.(\w+)\.")
ROWS_PER_MATMUL = {"f32": 8, "bf16": 16}  # one register of rows streams through; 32 of the 8-bit types
_CAPACITY = "== CAPA"  # the compiler's own spelling of the rest of the line varies


@dataclass
class Loop:
    """One loop body, or (at depth 0) the code outside of all loops. Counts are its own: inner loops are apart.

    Attributes:
      start: address of its first bundle.
      bundles: issued per iteration, empty ones too.
      fetches, fetched_granules: copies from HBM started, and their granules where the compiler knew them.
      stores, waits: copies to HBM started, waits for copies.
      matmul_rows: rows that matrix instructions stream through a matrix unit.
      units: slots used per unit of the core, as the compiler names them; spills and refills among them.
    """

    start: int
    depth: int
    bundles: int = 0
    fetches: int = 0
    fetched_granules: int = 0
    stores: int = 0
    waits: int = 0
    matmul_rows: int = 0
    units: dict[str, int] = field(default_factory=dict)
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        """Itself and all loops in it."""
        yield self
        for loop in self.inner:
            yield from loop.walk()

    @property
    def total_bundles(self) -> int:
        """With every inner loop passed once."""
        return sum(loop.bundles for loop in self.walk())

    @property
    def total_matmul_rows(self) -> int:
        return sum(loop.matmul_rows for loop in self.walk())


@dataclass(frozen=True)
class Utilization:
    """Slots per bundle of each unit, and how many of them each bundle uses."""

    capacity: dict[str, int]
    used: list[tuple[int, ...]]


def parse_bundles(lines: Iterable[str], utilization: Utilization | None = None) -> Loop:
    """The tree of a kernel's loops.

    Raises:
      ValueError: the text holds no bundles, or the two files are not of the same program.
    """
    root = Loop(0, 0)
    open_loops = [root]
    index = -1
    for line in lines:
        found = _BUNDLE.match(line)
        if found is None:
            continue
        index += 1
        address, mark, depth = int(found[1], 16), found[2], found[3].count(">")
        if depth or "{}" not in line:
            del open_loops[depth + 1 :]
            if mark == "LB" and len(open_loops) == depth + 1:  # the next loop at the same depth
                open_loops.pop()
            while len(open_loops) <= depth:
                loop = Loop(address, len(open_loops))
                open_loops[-1].inner.append(loop)
                open_loops.append(loop)
        _count(open_loops[-1], line, utilization, index)
    if index < 0:
        raise ValueError("no bundles in the dump: the compiler's format is not the one this was written for")
    if utilization is not None and len(utilization.used) != index + 1:
        raise ValueError(f"{index + 1} bundles and {len(utilization.used)} lines of utilization")
    return root


def _count(loop: Loop, line: str, utilization: Utilization | None, index: int) -> None:
    loop.bundles += 1
    for fetch in _FETCH.finditer(line):
        loop.fetches += 1
        loop.fetched_granules += int(fetch[1]) if fetch[1] != "%" else 0
    loop.stores += len(_STORE.findall(line))
    loop.waits += len(_WAIT.findall(line))
    for dtype in _MATMUL.findall(line):
        loop.matmul_rows += ROWS_PER_MATMUL.get(dtype, 32)
    if utilization is not None and index < len(utilization.used):
        for unit, used in zip(utilization.capacity, utilization.used[index]):
            loop.units[unit] = loop.units.get(unit, 0) + used


def parse_utilization(lines: Iterable[str]) -> Utilization:
    """Reads `final_hlo-static-per-bundle-utilization.txt`."""
    rows = iter(lines)
    names: list[str] = []
    for row in rows:
        if row.startswith(_CAPACITY):
            names = [name.strip() for name in next(rows).split(",")]
            break
    if not names:
        raise ValueError(
            "no unit names in the dump: the compiler's format is not the one this was written for"
        )
    slots = next(rows).split()
    used = [tuple(int(n) for n in row.split()) for row in rows if row.strip() and not row.startswith("==")]
    return Utilization(dict(zip(names, map(int, slots))), used)


def read_kernel(folder: Path, name: str) -> tuple[Loop, Utilization]:
    """The dumped kernel whose name in the program starts with `name`; the largest, where several do.

    Raises:
      FileNotFoundError: none was dumped.
    """
    files = [
        file
        for file in folder.glob("*final_bundles.txt")
        if "schedule-analysis" not in file.name and _kernel_name(file).startswith(name)
    ]
    if not files:
        there = sorted({_kernel_name(file) for file in folder.glob("*final_bundles.txt")})
        raise FileNotFoundError(f"no kernel {name!r} in the dump; there are {', '.join(there) or 'none'}")
    bundles = max(files, key=lambda file: file.stat().st_size)
    stem = bundles.name.rsplit("-", 2)[0]
    units = [
        file
        for file in folder.glob(f"{_escaped(stem)}-*-final_hlo-static-per-bundle-utilization.txt")
        if "pre-delay" not in file.name
    ]
    with units[0].open() as lines:
        utilization = parse_utilization(lines)
    with bundles.open() as lines:
        return parse_bundles(lines, utilization), utilization


def _kernel_name(file: Path) -> str:
    """`1795-name.1-72-final_bundles.txt` -> `name.1`."""
    return file.name.split("-", 1)[1].rsplit("-", 2)[0]


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)


def hot_loop(root: Loop) -> Loop:
    """The loop over KV blocks: the innermost one that streams the most rows through the matrix units.

    A kernel may hold several (for full and for masked blocks, for decode and for mixed steps); the busiest wins.
    """
    loops = [loop for loop in root.walk() if loop.depth]
    if not loops:
        raise ValueError("the kernel has no loop")
    return max(loops, key=lambda loop: (loop.matmul_rows, loop.depth, loop.bundles))
