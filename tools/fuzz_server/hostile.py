"""Values that break careless readers."""

from __future__ import annotations

import random
from typing import Any

from tools.fuzz_server.jsontext import Pairs, Raw

POWERS = [2**bits for bits in (7, 8, 15, 16, 24, 31, 32, 53, 63, 64, 128)]
SMALL = (0, 1, -1, 2, 3, 10, 1000, 10**6, 10**9, 10**18, -(10**18))
INTEGERS = (*SMALL, *(sign * power + step for power in POWERS for sign in (1, -1) for step in (-1, 0, 1)))
NUMBERS = (0.0, -0.0, 0.5, 1.5, 1e-300, 5e-324, 1e300, -1e300, 1e22, 16.0, 1.7976931348623157e308)
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E+2", "-0", "00", "1.", ".5", "+1", "0x10", "1e-999",
    "1" + "0" * 400, "-1" + "0" * 400, "1" + "0" * 5000, "0." + "3" * 5000, "1" + "0" * 400 + ".5",
    r'"\ud800"', r'"\udc00\ud800"', r'"a\ud83d"', r'"\u0000"', r'"\x41"', '"\t"', "'a'", "undefined", "True", "nul",
    "[1,]", '{"a":1,}', "//", "/* */ 1", '"' + "a" * 300,
)  # fmt: skip
STRINGS = (
    "", " ", "\u0000", "a", "5", "-1", "1e5", "true", "null", "NaN", "None", "🙂", "\ufeff", "\u202e", "ﷺ", "İ", "\r\n",
    "../../etc/passwd", "{{ 7*7 }}", "{% for i in range(10**9) %}x{% endfor %}", "%s%n", "<script>", "'; --",
    "<|end|>", "<s></s>", "http://127.0.0.1/", "\\", '"', "\x7f", "e\u0301" * 100, "\u0430" * 300,
)  # fmt: skip


def hostile(rng: random.Random, costly: bool = False, depth: int = 0) -> Any:
    """Any JSON value, or what only looks like one. costly: it may have megabytes."""
    pick = rng.random()
    if pick < 0.25:
        return rng.choice(INTEGERS)
    if pick < 0.33:
        return rng.choice(NUMBERS)
    if pick < 0.45:
        return Raw(rng.choice(RAW))
    if pick < 0.6:
        return rng.choice(STRINGS)
    if pick < 0.68:
        return rng.choice((None, True, False))
    if pick < 0.76:
        return long_value(rng, costly)
    if pick < 0.82:
        return nested(rng, costly)
    if depth > 2:
        return rng.choice(([], {}))
    if pick < 0.91:
        return [hostile(rng, False, depth + 1) for _ in range(rng.randrange(4))]
    return Pairs((rng.choice(STRINGS), hostile(rng, False, depth + 1)) for _ in range(rng.randrange(4)))


def long_value(rng: random.Random, costly: bool) -> Any:
    """A string, list or object of many entries."""
    size = rng.choice((300, 3000, 30_000) + ((300_000, 1_500_000) if costly else ()))
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(("a", "7", " ", "\n", "é", "🙂", "\u0000", "(")) * size
    if kind == 1:
        return "".join(rng.choice("abcde 123.,!?\n") for _ in range(min(size, 100_000)))
    if kind == 2:
        return Raw("[" + ",".join(["1"] * size) + "]")
    if kind == 3:
        return Raw("[" + ",".join(["[]"] * size) + "]")
    if kind == 4:
        return Raw("{" + ",".join(f'"{i}":{i % 100}' for i in range(size // 4)) + "}")
    if kind == 5:
        return Raw("[" + ",".join(['"a"'] * size) + "]")
    if kind == 6:
        return Raw("[" + ",".join(['{"role":"user","content":"x"}'] * (size // 20)) + "]")
    return [None] * size


def nested(rng: random.Random, costly: bool) -> Raw:
    """Brackets in brackets: a JSON reader's recursion, or whatever walks the value afterwards."""
    depth = rng.choice((3, 20, 100, 180, 199, 201, 1000) + ((100_000,) if costly else ()))
    kind = rng.randrange(4)
    if kind == 0:
        return Raw("[" * depth + "]" * depth)
    if kind == 1:
        return Raw('{"a":' * depth + "1" + "}" * depth)
    if kind == 2:
        return Raw('[{"a":' * depth + "[]" + "}]" * depth)
    return Raw("[" * depth)  # never closed
