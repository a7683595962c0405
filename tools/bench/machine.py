"""What a figure was measured on: machine, versions, and who else was using it."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jinfer import __version__

BUSY_SHARE = 0.15  # of all cores: beyond it somebody else's work shows in the figures
PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "torch")


@dataclass(frozen=True)
class Machine:
    """The host. load: the run queue's one-minute average at the start, before any work of ours; None if unknown."""

    cpu: str
    cores: int
    memory_gib: float | None
    system: str
    load: float | None
    versions: dict[str, str]
    accelerators: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        memory = f", {self.memory_gib:.0f} GiB" if self.memory_gib else ""
        devices = f", {' + '.join(self.accelerators)}" if self.accelerators else ""
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return f"{self.cpu}, {cores}{memory}{devices}, {self.system}"

    @property
    def is_busy(self) -> bool:
        return self.load is not None and self.load > BUSY_SHARE * 2 * self.cores


def look() -> Machine:
    """The machine as it is now. To be called before the benchmark makes load of its own."""
    return Machine(
        cpu=_cpu_name(),
        cores=num_cores(),
        memory_gib=_memory_gib(),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        versions=_versions(),
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerators() -> tuple[str, ...]:
    """Kinds of jax's devices, each once with its count; () on a CPU. Starts jax."""
    import jax

    kinds = [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    return tuple(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def _versions() -> dict[str, str]:
    # jinfer's own number needs no installed package: a checkout may run as it is.
    found = {"jinfer": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "model" in fields and not any(c.isdigit() for c in name):
        # Virtual machines often hide the number; family and model still tell the generation.
        name += f" (family {fields.get('cpu family', '?')}, model {fields['model']})"
    return name


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


class CpuWatch:
    """Tells which share of all cores other processes used since it was made. Linux only; None elsewhere.

    Args:
      pids: processes beside this one that belong to the benchmark.
    """

    def __init__(self, pids: Collection[int] = ()) -> None:
        self._pids = (os.getpid(), *pids)
        self._before = self._read()

    def others(self) -> float | None:
        after = self._read()
        if self._before is None or after is None:
            return None
        all_ticks, busy, own = (b - a for a, b in zip(self._before, after, strict=True))
        return min(max((busy - own) / all_ticks, 0.0), 1.0) if all_ticks > 0 else None

    def _read(self) -> tuple[int, int, int] | None:
        """Ticks of all cores, the busy ones among them (time stolen by other machines included), and our own."""
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0]
            ticks = [int(x) for x in first.split()[1:9]]
            own = 0
            for pid in self._pids:
                # The command's name, in parentheses, may hold spaces; user and system time are fields 14 and 15.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
        except (OSError, ValueError, IndexError):
            return None
        idle = ticks[3] + ticks[4]
        return sum(ticks), sum(ticks) - idle, own
