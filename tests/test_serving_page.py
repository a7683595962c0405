"""docs/serving.md has every flag with its default and its values, as the dataclasses have them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from jinfer import EngineConfig, ServerConfig

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
HEAD = ["flag", "default", "values", "when to change it"]


def default_cell(f: dataclasses.Field[Any]) -> str:
    value = f.default
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if isinstance(value, str) else str(value)


def values_cell(f: dataclasses.Field[Any]) -> str:
    meta, kind = f.metadata, str(f.type).replace(" | None", "")
    if kind == "bool":
        return "on, off"
    if meta.get("choices"):
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    low, high = meta.get("low"), meta.get("high")
    if low is not None:
        return f"at least {low}" if high is None else f"{low} to {high}"
    return {"str": "text", "int": "whole number", "float": "number"}.get(kind, "text, several")


def rows(page: str) -> list[list[str]]:
    """The rows of the page's tables of flags."""
    found, is_flags = [], False
    for line in page.splitlines():
        if not line.startswith("|"):
            is_flags = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells == HEAD:
            is_flags = True
        elif is_flags and not set(line) <= set("|-: "):
            found.append(cells)
    return found


def problems(page: str) -> list[str]:
    """What is wrong with the page, each with the row that would be right."""
    fields = {
        f"`--{f.name.replace('_', '-')}`": f
        for cls in (EngineConfig, ServerConfig)
        for f in dataclasses.fields(cls)
    }
    found, seen = [], set()
    for cells in rows(page):
        flag = cells[0]
        if flag not in fields:
            found.append(f"unknown flag {flag}")
            continue
        if flag in seen:
            found.append(f"{flag} stands twice")
        seen.add(flag)
        wanted = [flag, default_cell(fields[flag]), values_cell(fields[flag])]
        if cells[:3] != wanted:
            found.append(f"{flag}: expected | {' | '.join(wanted)} | and got | {' | '.join(cells[:3])} |")
        if len(cells) != len(HEAD) or len(cells[-1]) < 10:
            found.append(f"{flag}: does not say when to change it")
    for flag, f in fields.items():
        if flag not in seen:
            found.append(
                f"missing flag, add | {flag} | {default_cell(f)} | {values_cell(f)} | when to change it |"
            )
    return found


def test_the_page_agrees_with_the_flags():
    assert problems(PAGE.read_text()) == []


@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        (r"\| `--seed` .*\n", "", "missing flag, add | `--seed` | 0 | 0 to 2147483647 |"),
        (
            r"`--max-num-seqs` \| 32",
            "`--max-num-seqs` | 64",
            "`--max-num-seqs`: expected | `--max-num-seqs` | 32 |",
        ),
        (r"0.1 to 86400.0", "1 to 86400.0", "`--request-timeout`: expected"),
        (r"`fcfs`, `priority` \|", "`fcfs` |", "`--scheduling-policy`: expected"),
        (
            r"(\| `--warmup`)",
            r"| `--warm-up` | on | on, off | never, it is wrong |\n\1",
            "unknown flag `--warm-up`",
        ),
        (r"(\| `--port`.*\n)", r"\1\1", "`--port` stands twice"),
        (r"(`--api-key` \| .* \|) whenever.*", r"\1 |", "`--api-key`: does not say when to change it"),
    ],
)
def test_a_wrong_page_is_noticed(pattern, replacement, complaint):
    """The comparison can fail: a flag left out, renamed or repeated, a default or range that is not the field's."""
    page = PAGE.read_text()
    changed, count = re.subn(pattern, replacement, page)
    assert count == 1
    found = problems(changed)
    assert len(found) == 1
    assert found[0].startswith(complaint)
