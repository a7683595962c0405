"""A picture of a report: throughput as bars, latencies as cumulative distributions."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np

from tools.bench.report import THROUGHPUT, Report, write_file

# Okabe and Ito's colours, told apart by colour-blind readers too; the measured system has the first.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, FAINT = "#333333", "#DDDDDD"
PANELS = (
    ("ttft", "time to first token"),
    ("itl", "gap between tokens"),
    ("e2e", "whole request"),
)


def write_plot(report: Report, path: str) -> None:
    """Writes a PNG. Raises ConfigError if the file cannot be written."""
    # Figure without pyplot: no window, no global state, whatever backend is set.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(14, 5), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    axes = figure.subplots(1, 1 + len(PANELS), width_ratios=(1.1, 1, 1, 1))
    _draw_throughput(axes[0], report)
    for axis, (name, words) in zip(axes[1:], PANELS, strict=True):
        _draw_latency(axis, report, name, words)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper right",
        ncols=len(labels),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
    )
    figure.suptitle(report.title, x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK)
    small = "\n".join(
        [*report.notes[-1:], report.machine.line, *(f"warning: {w}" for w in report.warnings[:2])]
    )
    figure.supxlabel(small, x=0.008, ha="left", fontsize=8, color="#777777")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())


def _draw_throughput(axis: Any, report: Report) -> None:
    """A bar for the median, a dot for every run."""
    for i, (name, figures) in enumerate(report.figures.items()):
        median = report.medians[name].get(THROUGHPUT, 0.0)
        axis.bar(i, median, width=0.62, color=COLOURS[i % len(COLOURS)])
        runs = [f[THROUGHPUT] for f in figures if THROUGHPUT in f]
        if len(runs) > 1:
            axis.plot(
                [i] * len(runs), runs, "o", color="white", markeredgecolor=INK, markersize=4, linestyle="none"
            )
        top = max([median, *runs])
        axis.annotate(
            f"{median:.0f}" if median >= 100 else f"{median:.1f}",
            (i, top),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=11,
            fontweight="bold",
            color=INK,
        )
    axis.set_xticks(range(len(report.runs)), [textwrap.fill(name, 16) for name in report.runs])
    axis.set_xlim(-0.6, len(report.runs) - 0.4)
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    _style(axis, "output tokens per second", grid="y")


def _draw_latency(axis: Any, report: Report, name: str, words: str) -> None:
    """The share of values at or under each latency, all runs together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    spread = []
    for i, (system, runs) in enumerate(report.runs.items()):
        values = np.sort(np.array([v for run in runs for v in run.latencies(name)])) * 1000
        if not len(values):
            values = np.array([np.nan])
        spread.append(values)
        share = np.arange(1, len(values) + 1) / len(values)
        axis.step(
            np.concatenate([values[:1], values]),
            np.concatenate([[0.0], share]),
            where="post",
            color=COLOURS[i % len(COLOURS)],
            linewidth=2,
            label=system,
        )
    every = np.concatenate(spread)
    every = every[np.isfinite(every) & (every > 0)]
    if len(every) and np.percentile(every, 95) > 20 * np.percentile(every, 5):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)
    if name in report.limits:
        axis.axvline(report.limits[name] * 1000, color="#999999", linestyle="--", linewidth=1)
    axis.set_ylim(0, 1.02)
    axis.set_yticks([0, 0.5, 0.95], ["0", "p50", "p95"])
    axis.set_xlabel("milliseconds", fontsize=9, color=INK)
    _style(axis, words, grid="both")


def _style(axis: Any, title: str, grid: Any) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#999999")
    axis.tick_params(which="minor", length=0)
    axis.grid(axis=grid, color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)
