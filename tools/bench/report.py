"""The result of a benchmark: figures, ratios, goals and warnings; as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinfer import ConfigError
from tools.bench.figures import (
    LATENCIES,
    Agreement,
    Figures,
    Ratio,
    RunResult,
    agreement,
    medians,
    ratio,
    summarize,
)
from tools.bench.machine import BUSY_SHARE, Machine

THROUGHPUT = "output_tokens_per_second"
# Ratios that are reported, and whether more of it is better.
RATIOS = {
    THROUGHPUT: True,
    "total_tokens_per_second": True,
    "ttft_ms.p50": False,
    "tpot_ms.p50": False,
    "itl_ms.p99": False,
    "e2e_ms.p50": False,
}
# Rows of the table: figure, words, digits. Latencies have rows of their own.
ROWS = (
    (THROUGHPUT, "output tokens/s", 1),
    ("total_tokens_per_second", "total tokens/s", 1),
    ("requests_per_second", "requests/s", 2),
    ("goodput_requests_per_second", "goodput, requests/s", 2),
    ("goodput_share", "goodput, share of requests", 3),
)
ENGINE_ROWS = (
    ("steps", "steps", 0),
    ("host_ms_per_step", "host ms per step", 3),
    ("peak_rows", "most rows running", 0),
    ("host_ms_per_step_at_peak_rows", "host ms per step with that many", 3),
    ("device_wait_ms_per_step", "wait for the device, ms per step", 2),
    ("kv_waste", "KV waste, share", 4),
    ("preemptions", "preemptions", 0),
    ("recompiles", "recompiles", 0),
)
COUNT_ROWS = (
    ("requests", "requests", 0),
    ("errors", "errors", 0),
    ("prompt_tokens", "prompt tokens", 0),
    ("cached_prompt_tokens", "of them found in a prefix cache", 0),
    ("output_tokens", "output tokens", 0),
    ("seconds", "seconds", 2),
    ("others_cpu_share", "cores used by other processes", 2),
)


@dataclass(frozen=True)
class Goal:
    """A figure that was promised."""

    name: str
    wanted: str
    found: float
    is_met: bool


@dataclass
class Report:
    """Everything one benchmark found. `runs` names the measured system first, the compared ones after it."""

    title: str
    machine: Machine
    settings: Mapping[str, Any]
    runs: Mapping[str, Sequence[RunResult]]
    limits: Mapping[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figures = {name: [summarize(r, self.limits) for r in runs] for name, runs in self.runs.items()}
        self.medians = {name: medians(figures) for name, figures in self.figures.items()}
        self.main, *self.peers = list(self.runs)

    @property
    def best_peer(self) -> str | None:
        """The compared system with the highest output rate: the one that ratios count against."""
        return max(self.peers, key=lambda name: self.medians[name].get(THROUGHPUT, 0.0), default=None)

    def better_by(self, peer: str, name: str) -> Ratio | None:
        """How many times better the measured system is than a peer; above 1 is better for latencies too."""
        ours, theirs = self.figures[self.main], self.figures[peer]
        return ratio(ours, theirs, name) if RATIOS[name] else ratio(theirs, ours, name)

    def agreement(self, peer: str) -> Agreement | None:
        """Mean over the runs; None if a system does not tell its tokens."""
        pairs = list(zip(self.runs[self.main], self.runs[peer], strict=True))
        if not all(record.token_ids for pair in pairs for run in pair for record in run.good):
            return None
        found = [agreement(a, b) for a, b in pairs]
        return Agreement(
            sum(f.requests for f in found) / len(found), sum(f.tokens for f in found) / len(found)
        )

    def add_goals(
        self,
        *,
        min_ratio: float | None = None,
        min_tokens_per_second: float | None = None,
        max_host_ms: float | None = None,
        max_kv_waste: float | None = None,
    ) -> None:
        """Holds the figures against goals. A ratio without a peer raises ConfigError."""
        ours = self.medians[self.main]
        if min_ratio is not None:
            if self.best_peer is None:
                raise ConfigError("min_ratio needs something to compare with: give compare too")
            found = self.better_by(self.best_peer, THROUGHPUT)
            value = found.median if found else 0.0
            name = f"output tokens/s against {self.best_peer}"
            self.goals.append(Goal(name, f"at least {min_ratio:g} times", value, value >= min_ratio))
        if min_tokens_per_second is not None:
            value = ours.get(THROUGHPUT, 0.0)
            self._add(
                "output tokens/s",
                f"at least {min_tokens_per_second:g}",
                value,
                value >= min_tokens_per_second,
            )
        if max_host_ms is not None:
            value = ours["host_ms_per_step_at_peak_rows"]
            name = f"host ms per step at {ours['peak_rows']:.0f} rows"
            self._add(name, f"at most {max_host_ms:g}", value, value <= max_host_ms)
        if max_kv_waste is not None:
            value = ours["kv_waste"]
            self._add("KV waste", f"at most {max_kv_waste:g}", value, value <= max_kv_waste)

    def _add(self, name: str, wanted: str, found: float, is_met: bool) -> None:
        self.goals.append(Goal(name, wanted, found, is_met))

    @property
    def is_disturbed(self) -> bool:
        """True if other processes took enough of the machine to make figures and ratios worthless."""
        shares = (figures.get("others_cpu_share", 0.0) for figures in self.medians.values())
        return self.machine.is_busy or max(shares) > BUSY_SHARE

    @property
    def warnings(self) -> list[str]:
        """What makes the figures doubtful."""
        found = []
        if self.machine.is_busy:
            found.append(
                f"the machine was busy at the start (load average {self.machine.load:.1f} on "
                f"{self.machine.cores} cores): run again when it is idle"
            )
        for name, figures in self.medians.items():
            if figures.get("others_cpu_share", 0.0) > BUSY_SHARE:
                share = figures["others_cpu_share"]
                found.append(
                    f"other processes used {share:.0%} of the cores while {name} ran: neither its figures nor "
                    "ratios with it can be trusted"
                )
            errors = sum(f["errors"] for f in self.figures[name])
            if errors:
                first = next(r.error for run in self.runs[name] for r in run.records if r.error)
                found.append(
                    f"{name}: {errors:.0f} requests failed and are not in the figures; the first: {first}"
                )
            if figures.get("recompiles"):
                found.append(f"{name} compiled while serving, which is a bug: please report it")
            if figures.get("cached_prompt_tokens") and not self.settings.get("shared_prefix_len"):
                found.append(
                    f"{name} found prompts in its prefix cache from earlier: use another workload_seed"
                )
        return found

    # As text

    def text(self) -> str:
        blocks = [self._head(), self._table(), self._comparison(), self._endnotes()]
        return "\n\n".join(block for block in blocks if block)

    def _head(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.machine.versions.items())
        load = "" if self.machine.load is None else f"; load average at the start {self.machine.load:.2f}"
        runs = len(self.runs[self.main])
        median = f"medians of {runs} runs" if runs > 1 else "one run"
        lines = [f"{self.title}; {median}", self.machine.line + load, versions, *self.notes]
        return "\n".join(lines)

    def _table(self) -> str:
        rows: list[tuple[str, ...]] = [("", *self.runs)]

        def add(names: Sequence[tuple[str, str, int]]) -> None:
            for name, words, digits in names:
                if any(name in figures for figures in self.medians.values()):
                    rows.append((words, *(shown(f.get(name), digits) for f in self.medians.values())))

        add(ROWS)
        for latency in LATENCIES:
            names = [f"{latency}_ms.{part}" for part in ("mean", "p50", "p95", "p99")]
            cells = [" / ".join(brief(f.get(name)) for name in names) for f in self.medians.values()]
            rows.append((f"{latency.upper()} ms, mean / p50 / p95 / p99", *cells))
        add(ENGINE_ROWS)
        add(COUNT_ROWS)
        return aligned(rows)

    def _comparison(self) -> str:
        if not self.peers:
            return ""
        rows: list[tuple[str, ...]] = [
            (f"{self.main} is better by", *(f"than {peer}" for peer in self.peers))
        ]
        for name in RATIOS:
            found = [self.better_by(peer, name) for peer in self.peers]
            cells = (f"{r.median:.2f} times ({r.low:.2f} to {r.high:.2f})" if r else "-" for r in found)
            rows.append((name.replace("_per_second", "/s").replace("_", " ").replace(".", " "), *cells))
        agreements = [self.agreement(peer) for peer in self.peers]
        if any(agreements):
            cells = (f"{a.tokens:.2%} ({a.requests:.0%} of outputs)" if a else "-" for a in agreements)
            rows.append(("identical greedy tokens", *cells))
        best = self.best_peer
        found = self.better_by(best, THROUGHPUT) if best else None
        if found is None:
            return aligned(rows)
        doubt = ", on a machine busy with other work" if self.is_disturbed else ""
        among = f", the best of {len(self.peers)}" if len(self.peers) > 1 else ""
        headline = f"{self.main} gives {found.median:.2f} times the output tokens/s of {best}{among}{doubt}"
        return f"{aligned(rows)}\n\n{headline}"

    def _endnotes(self) -> str:
        lines = [
            f"goal {'reached' if g.is_met else 'MISSED'}: {g.name} {g.found:.3g}, wanted {g.wanted}"
            for g in self.goals
        ]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])

    # As JSON

    def document(self) -> dict[str, Any]:
        """Everything, as plain values: latencies in milliseconds, ratios above 1 where we are better."""
        return {
            "benchmark": self.title,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": asdict(self.machine),
            "settings": dict(self.settings),
            "notes": self.notes,
            "systems": {
                name: {"median": nested(self.medians[name]), "runs": [nested(f) for f in self.figures[name]]}
                for name in self.runs
            },
            "better_by": {
                peer: {name: asdict(r) for name in RATIOS if (r := self.better_by(peer, name))}
                for peer in self.peers
            },
            "best_peer": self.best_peer,
            "identical_greedy_tokens": {
                peer: asdict(a) for peer in self.peers if (a := self.agreement(peer)) is not None
            },
            "goals": [asdict(goal) for goal in self.goals],
            "warnings": self.warnings,
        }

    def write_json(self, path: str) -> None:
        write_file(path, (json.dumps(self.document(), indent=2) + "\n").encode())


def write_file(path: str, content: bytes) -> None:
    """Raises ConfigError saying why a result could not be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def nested(figures: Figures) -> dict[str, Any]:
    """{'ttft_ms.p50': 3.0} as {'ttft_ms': {'p50': 3.0}}."""
    tree: dict[str, Any] = {}
    for name, value in figures.items():
        group, _, leaf = name.partition(".")
        if leaf:
            tree.setdefault(group, {})[leaf] = value
        else:
            tree[name] = value
    return tree


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def brief(value: float | None) -> str:
    """Three digits, as many as a latency deserves."""
    if value is None:
        return "-"
    return shown(value, 0 if value >= 100 else 1 if value >= 10 else 2)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other: the first to the left, the others to the right, a line under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])
