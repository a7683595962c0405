"""docs/security.md names tests that exist and constants with their values."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from jinfer import EngineConfig, ServerConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED_TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
BOUNDS = re.findall(r"^\| [^|]+ \| ([^|]+) \| `([^`]+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("file", "name"), NAMED_TESTS)
def test_the_tests_that_it_names_exist(file, name):
    assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).exists()


@pytest.mark.parametrize(("value", "where"), BOUNDS)
def test_the_bounds_are_those_of_the_code(value, where):
    if where.startswith("--"):
        name = where.removeprefix("--").replace("-", "_")
        fields = {f.name: f for config in (EngineConfig, ServerConfig) for f in dataclasses.fields(config)}
        default = fields[name].default
        assert value.startswith("what ") if default is None else float(value) == default
    else:
        module, _, constant = where.partition(":")
        assert float(value) == getattr(importlib.import_module(module), constant)


def test_there_are_bounds_and_tests():
    assert len(BOUNDS) > 20
    assert len(NAMED_TESTS) > 10
