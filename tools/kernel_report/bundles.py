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
_MATMUL = re.compile(r"\bvmatmul\.(?:mubr\.|msk\.)*(\w+)\.")
ROWS_PER_MATMUL = {"f32": 8, "bf16": 16}  # one register of rows streams through; 32 of the 8-bit types
_BRANCH = re.compile(r"sbr\.rel \(!?%\S+\) target = \$region(\d+)")
_REGION = re.compile(r"region (\d+)")
_CAPACITY = "== CAPA"  # the compiler's own spelling of the rest of the line varies


@dataclass
class Region:
    """A loop body, a branch's body, or (the root) the whole kernel. Counts are its own: inner regions are apart.

    Attributes:
      start, end: its bundles, half open, counted from the kernel's first.
      is_loop: its end leads back to its start; else a branch may pass it over.
      bundles: issued in it, empty ones too.
      fetches, fetched_granules: copies from HBM started, and their granules where the compiler knew them.
      stores, waits: copies to HBM started, waits for copies.
      matmul_rows: rows that matrix instructions stream through a matrix unit.
      units: slots used per unit of the core, as the compiler names them; spills and refills among them.
      first_fetch, first_wait: the bundles of the first of each, None where there is none.
    """

    start: int
    end: int
    is_loop: bool
    bundles: int = 0
    fetches: int = 0
    fetched_granules: int = 0
    stores: int = 0
    waits: int = 0
    matmul_rows: int = 0
    units: dict[str, int] = field(default_factory=dict)
    first_fetch: int | None = None
    first_wait: int | None = None
    inner: list[Region] = field(default_factory=list)

    def walk(self) -> Iterator[Region]:
        """Itself and all regions in it."""
        yield self
        for region in self.inner:
            yield from region.walk()

    def total(self, count: str) -> int:
        """A count with all regions in it, each passed once."""
        return sum(getattr(region, count) for region in self.walk())

    def units_total(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for region in self.walk():
            for unit, used in region.units.items():
                totals[unit] = totals.get(unit, 0) + used
        return totals


@dataclass(frozen=True)
class Utilization:
    """Slots per bundle of each unit, and how many of them each bundle uses."""

    capacity: dict[str, int]
    used: list[tuple[int, ...]]


def parse_bundles(lines: Iterable[str], utilization: Utilization | None = None) -> Region:
    """The tree of a kernel's loops and branches.

    Raises:
      ValueError: the text holds no bundles, or the two files are not of the same program.
    """
    found = [(match, line) for line in lines if (match := _BUNDLE.match(line))]
    if not found:
        raise ValueError("no bundles in the dump: the compiler's format is not the one this was written for")
    if utilization is not None and len(utilization.used) != len(found):
        raise ValueError(f"{len(found)} bundles and {len(utilization.used)} lines of utilization")
    root = Region(0, len(found), is_loop=False)
    for region in sorted([*_loops(found), *_branches(found)], key=lambda region: (region.start, -region.end)):
        _insert(root, region)
    for index, (_, line) in enumerate(found):
        _count(_innermost(root, index), line, utilization.capacity if utilization else {}, utilization, index)
    return root


def _loops(found: list[tuple[re.Match[str], str]]) -> Iterator[Region]:
    open_loops: list[int] = []  # where each depth's loop began
    for index, (match, line) in enumerate(found):
        depth = match[3].count(">")
        if not depth and "{}" in line:
            continue
        keep = depth - 1 if match[2] == "LB" else depth
        while len(open_loops) > keep:
            yield Region(open_loops.pop(), index, is_loop=True)
        while len(open_loops) < depth:
            open_loops.append(index)
    while open_loops:
        yield Region(open_loops.pop(), len(found), is_loop=True)


def _branches(found: list[tuple[re.Match[str], str]]) -> Iterator[Region]:
    ends = {
        int(number): index
        for index, (match, line) in enumerate(found)
        if match[2] == "PF"
        for number in _REGION.findall(line)
    }
    for index, (_, line) in enumerate(found):
        for number in _BRANCH.findall(line):
            end = ends.get(int(number), 0)
            if end > index + 1:
                yield Region(index + 1, end, is_loop=False)


def _insert(parent: Region, region: Region) -> None:
    """Puts a region where it belongs. Regions come by their start; one that crosses another's end is left out."""
    if parent.inner and region.start < parent.inner[-1].end:
        if region.end <= parent.inner[-1].end:
            _insert(parent.inner[-1], region)
        return
    parent.inner.append(region)


def _innermost(region: Region, index: int) -> Region:
    for inner in region.inner:
        if inner.start <= index < inner.end:
            return _innermost(inner, index)
    return region


def _count(
    region: Region, line: str, units: Iterable[str], utilization: Utilization | None, index: int
) -> None:
    region.bundles += 1
    for fetch in _FETCH.finditer(line):
        region.fetches += 1
        region.fetched_granules += int(fetch[1]) if fetch[1] != "%" else 0
        region.first_fetch = index if region.first_fetch is None else region.first_fetch
    region.stores += len(_STORE.findall(line))
    waits = len(_WAIT.findall(line))
    region.waits += waits
    if waits and region.first_wait is None:
        region.first_wait = index
    for dtype in _MATMUL.findall(line):
        region.matmul_rows += ROWS_PER_MATMUL.get(dtype, 32)
    if utilization is not None:
        for unit, used in zip(units, utilization.used[index]):
            region.units[unit] = region.units.get(unit, 0) + used


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


def read_kernel(folder: Path, name: str) -> tuple[Region, Utilization]:
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


def hot_loop(root: Region) -> Region:
    """The loop over KV blocks: the innermost one that streams the most rows through the matrix units.

    A kernel may hold several (for full and for masked blocks, for decode and for mixed steps); the busiest wins.
    """
    loops = [region for region in root.walk() if region.is_loop]
    if not loops:
        raise ValueError("the kernel has no loop")
    direct = {id(loop): _matmul_rows(loop) for loop in loops}
    return max(loops, key=lambda loop: (direct[id(loop)], -loop.total("bundles")))


def _matmul_rows(loop: Region) -> int:
    """Of the loop and its branches, without the loops in it."""
    return loop.matmul_rows + sum(_matmul_rows(region) for region in loop.inner if not region.is_loop)


def steady_pass(loop: Region) -> list[Region]:
    """What a pass in the middle of the work issues: the loop's own bundles and the branches that then are taken.

    Of branches with matrix work the busiest one is taken, the shortest of equally busy ones (blocks that need no
    mask). Branches without matrix work are taken when they fetch; the others open or close a tile of queries. Where
    one branch fetches a full block in a row, one that loops over single fetches is for the last block, which is not
    full.
    """
    parts = [loop]
    working = [region for region in loop.inner if region.total("matmul_rows")]
    if working:
        parts += steady_pass(max(working, key=lambda r: (r.total("matmul_rows"), -r.total("bundles"))))
    fetching = [region for region in loop.inner if region not in working and region.total("fetches")]
    in_a_row = [region for region in fetching if _fetches_in_a_row(region)]
    for region in in_a_row or fetching:
        parts += steady_pass(region)
    return parts


def _fetches_in_a_row(region: Region) -> int:
    """Those outside of loops."""
    if region.is_loop:
        return 0
    return region.fetches + sum(_fetches_in_a_row(inner) for inner in region.inner)


def fetches_ahead(root: Region, hot: Region) -> bool | None:
    """Whether the loop, or the nearest one around it that fetches, asks for a block before it waits for one.

    Then copies are in flight while the kernel computes. None where no loop fetches.
    """
    around = [region for region in root.walk() if region.is_loop and any(r is hot for r in region.walk())]
    for loop in reversed(around):
        fetches = [r.first_fetch for r in loop.walk() if r.first_fetch is not None]
        waits = [r.first_wait for r in loop.walk() if r.first_wait is not None]
        if fetches and waits:
            return min(fetches) < min(waits)
    return None
