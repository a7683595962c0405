"""One published model of every family, its steps compiled for a TPU that is not there: the table of docs/models.md.

    python -m tools.compile_check.models                                       # every model of configs/models
    python -m tools.compile_check.models --model qwen3-8b,phi-2 --write docs/models.md
    python -m tools.compile_check.models --facts --write docs/models.md        # compile nothing

Weights and KV are shapes alone. `--write` puts the rows into the page's table and leaves its other rows as they are;
with `--facts` it adds what the configurations alone say, for models that have no row yet.
Exit code 1 if a model does not compile or copies KV pages that should be updated in place, 2 if the compiler is not
installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import targets
from tools.compile_check.model_child import static_facts

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
BEGIN, END = "<!-- compiled steps: begin -->", "<!-- compiled steps: end -->"
HEADER = (
    "| model | family | parameters | devices | weights GiB | KV bytes a token | of them in windows | "
    "KV against full attention | attention | temporaries MB, decode | prefill |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
NOT_COMPILED = "–"
GIB = 1024**3
# Four devices unless the heads do not divide among them: 10 KV heads divide among two.
DEVICES = {"phi-3-medium": 2}
LEFT_OUT = ("llama-3-70b",)  # its weights alone are more than the four devices hold


@dataclass(frozen=True)
class Row:
    """One model. Weights and temporaries are bytes of one device, KV bytes of all together."""

    model: str
    devices: int
    facts: dict[str, Any]
    compiled: dict[str, Any] | None

    @property
    def problem(self) -> str | None:
        if self.compiled is None:
            return None
        for name in ("decode", "mixed"):
            step = self.compiled[name]
            if step["alias_bytes"] < step["kv_bytes"]:
                return f"the {name} step copies KV: {step['alias_bytes']} of {step['kv_bytes']} bytes are aliased"
        return None

    def __str__(self) -> str:
        f, c = self.facts, self.compiled
        if f["windows"]:
            windows = f"{f['windowed_kv_bytes_per_token']:,} ({', '.join(map(str, f['windows']))})"
            share = f"{f['kv_fraction']:.3f} at {f['longest']:,} tokens"
        else:
            windows = share = ""
        found = [NOT_COMPILED] * 3
        if c is not None:
            found = [c["attention"], *(f"{c[step]['temp_bytes'] / 1e6:.1f}" for step in ("decode", "mixed"))]
        cells = (
            self.model,
            f["family"],
            f"{f['parameters'] / 1e9:.2f}e9",
            str(self.devices),
            f"{f['weight_bytes'] / GIB:.2f}",
            f"{f['kv_bytes_per_token']:,}",
            windows,
            share,
            *found,
        )
        return f"| {' | '.join(cells)} |"


def compile_row(name: str, target: Any, *, rows: int, tokens: int, context: int) -> Row:
    """Raises ChildError if it does not compile."""
    folder, devices, facts = MODELS / name, DEVICES.get(name, 4), facts_of(name)
    request = {
        "folder": str(folder),
        "tensor": devices,
        "rows": rows,
        "tokens": tokens,
        "context": min(context, facts["longest"]),
    }
    compiled = targets.run_child("tools.compile_check.model_child", target, request)
    return Row(name, devices, facts, compiled)


def facts_of(name: str) -> dict[str, Any]:
    """What a model's configuration says."""
    return static_facts(MODELS / name, DEVICES.get(name, 4))


def merge(page: str, rows: list[str]) -> str:
    """The page with these rows in its table, in the order of their names; other rows stay, and so does one that was
    compiled where the new one is not.

    Raises:
      ValueError: the page has no table.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"expected one {BEGIN} and one {END} in the page")
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    found = [line for line in table.splitlines() if line.startswith("| ") and line != HEADER[0]]
    kept = {_name(line): line for line in found}
    for line in rows:
        if NOT_COMPILED not in line or NOT_COMPILED in kept.get(_name(line), NOT_COMPILED):
            kept[_name(line)] = line
    lines = [BEGIN, *HEADER, *(kept[name] for name in sorted(kept)), END]
    return before + "\n".join(lines) + after


def _name(row: str) -> str:
    return row.split("|")[1].strip()


def names() -> list[str]:
    return sorted(
        path.parent.name for path in MODELS.glob("*/config.json") if path.parent.name not in LEFT_OUT
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check.models",
        description="Compile a model of every family for a TPU that is not there.",
    )
    parser.add_argument("--model", help=f"comma separated, of {', '.join(names())}")
    parser.add_argument("--target", default="v6e", help="default: v6e, four devices")
    parser.add_argument("--rows", type=int, default=32, help="running sequences")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prefill step")
    parser.add_argument(
        "--context", type=int, default=4096, help="tokens per sequence, or what the model knows"
    )
    parser.add_argument("--facts", action="store_true", help="compile nothing: what the configurations say")
    parser.add_argument("--write", metavar="FILE.md", type=Path, help="page whose table gets the rows")
    options = parser.parse_args(arguments)
    target = targets.find(options.target)
    reason = None if options.facts else target.missing()
    if reason is not None:
        print(f"{target.name}: {reason}", file=sys.stderr)
        return 2
    chosen = options.model.split(",") if options.model else names()
    unknown = sorted(name for name in chosen if not (MODELS / name / "config.json").is_file())
    if unknown:
        print(f"unknown models {', '.join(unknown)}: use some of {', '.join(names())}", file=sys.stderr)
        return 1
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # before jax is imported: only the child may reach for the target's library
    )
    print("\n".join(HEADER), flush=True)
    status = 0
    for name in chosen:
        try:
            row = (
                Row(name, DEVICES.get(name, 4), facts_of(name), None)
                if options.facts
                else compile_row(
                    name, target, rows=options.rows, tokens=options.tokens, context=options.context
                )
            )
        except targets.ChildError as error:
            print(f"{name} does not compile for {target.name}: {error}", file=sys.stderr, flush=True)
            status = 1
            continue
        print(row, flush=True)
        if row.problem is not None:
            print(f"{name}: {row.problem}", file=sys.stderr, flush=True)
            status = 1
        if options.write is not None:
            page = options.write.read_text(encoding="utf-8")
            options.write.write_text(merge(page, [str(row)]), encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
