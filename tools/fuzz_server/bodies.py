"""Bodies of requests: valid mixtures of fields, and what mutation makes of them."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

from tools.fuzz_server.endpoints import Endpoint, fits
from tools.fuzz_server.examples import COSTLY, ELSEWHERE, EXAMPLES, EXTREMES, least
from tools.fuzz_server.hostile import INTEGERS, hostile, long_value, nested
from tools.fuzz_server.jsontext import Pairs, Raw, encode

COSTLY_SHARE = 0.02  # of the bodies may have megabytes or ask for much


@dataclass(frozen=True)
class Made:
    """A body: its bytes, what was done to it, and its fields where it is still an object that could be shrunk."""

    data: bytes
    note: str
    fields: dict[str, Any] | None


def make_body(endpoint: Endpoint, rng: random.Random) -> Made:
    """A body for an endpoint, valid or not."""
    if rng.random() < 0.05:
        return _made(_extreme(endpoint, rng), "extremes")
    costly = rng.random() < COSTLY_SHARE
    body = _valid(endpoint, rng, costly)
    kind = rng.random()
    if kind < 0.3:
        return _made(body, "valid mixture")
    if kind < 0.65:
        name = _pick(endpoint, rng)
        body[name] = _near(endpoint, name, rng, costly)
        return _made(body, f"field {name}")
    if kind < 0.8:
        where = _mutate_inside(body, rng, costly)
        return _made(body, f"inside {where}")
    if kind < 0.86:
        name = rng.choice(ELSEWHERE)
        body[name] = rng.choice((None, False, "", [], {}, hostile(rng)))
        return _made(body, f"foreign field {name[:30]!r}")
    if kind < 0.9:
        name = _pick(endpoint, rng)
        pairs = Pairs(body.items())
        pairs.items.append((name, hostile(rng)))
        pairs.items.extend((name, rng.choice(INTEGERS)) for _ in range(rng.choice((0, 1, 2000))))
        return Made(encode(pairs).encode(), f"repeated field {name}", None)
    if kind < 0.93:
        for name in rng.sample(list(body), min(len(body), rng.randrange(1, 3))):
            del body[name]
        return _made(body, "fields left out")
    return _as_text(body, rng, costly)


def _made(body: dict[str, Any], note: str) -> Made:
    return Made(encode(body).encode(errors="surrogatepass"), note, body)


def _valid(endpoint: Endpoint, rng: random.Random, costly: bool) -> dict[str, Any]:
    body = copy.deepcopy(least(endpoint.fields))
    if "stream" in endpoint.fields and rng.random() < 0.4:
        body["stream"] = True
    names = [_pick(endpoint, rng) for _ in range(rng.randrange(5))]
    if costly:
        names.append(rng.choice(sorted(COSTLY.keys() & endpoint.fields.keys()) or list(endpoint.fields)))
    for name in names:
        if name in EXAMPLES:
            choices = COSTLY.get(name, ()) if costly and name == names[-1] else EXAMPLES[name]
            choices = [value for value in choices if fits(value, endpoint.fields[name])]
            if choices:
                body[name] = copy.deepcopy(rng.choice(choices))
        elif rng.random() < 0.2:  # a guess, and often refused
            body[name] = _of_type(endpoint.fields[name], rng)
    if body.get("n", 1) > 3 and "max_tokens" in body and not costly:
        body["max_tokens"] = 2
    elif rng.random() < 0.3 or body.get("min_tokens", 0) > 64:
        body.pop("max_tokens", None)  # up to the model's length
    return body


def _extreme(endpoint: Endpoint, rng: random.Random) -> dict[str, Any]:
    """A short body with one to three fields at the far end of their range."""
    body = copy.deepcopy(least(endpoint.fields))
    names = sorted(EXTREMES.keys() & endpoint.fields.keys())
    chosen = rng.sample(names, min(len(names), rng.randrange(1, 4)))
    if rng.random() < 0.5 and "n" not in chosen:
        body.pop("max_tokens", None)
    return body | {name: copy.deepcopy(rng.choice(EXTREMES[name])) for name in chosen}


def _pick(endpoint: Endpoint, rng: random.Random) -> str:
    """A field, mostly one that acts: a server names a hundred more that it takes at their off value only."""
    acting = [name for name in endpoint.fields if name in EXAMPLES]
    return rng.choice(acting if acting and rng.random() < 0.7 else list(endpoint.fields))


def _of_type(types: frozenset[str], rng: random.Random) -> Any:
    kind = rng.choice(sorted(types))
    return {
        "null": None,
        "boolean": rng.random() < 0.5,
        "integer": rng.choice((0, 1, 2, 5)),
        "number": rng.choice((0, 0.5, 1)),
        "string": rng.choice(("", "a", "none", "auto")),
        "array": rng.choice(([], ["a"], [1], [{}])),
        "object": rng.choice(({}, {"a": 1})),
    }.get(kind)


def _near(endpoint: Endpoint, name: str, rng: random.Random, costly: bool) -> Any:
    """A wrong value of a field: often of the right type, or a right one inside another."""
    pick = rng.random()
    known = EXAMPLES.get(name)
    if known and pick < 0.15:
        value = copy.deepcopy(rng.choice(known))
        return rng.choice(([value], {"a": value}, [value] * 3, str(value), [[value]]))
    types = endpoint.fields[name]
    for _ in range(4):
        value = hostile(rng, costly)
        if pick > 0.5 or isinstance(value, (Raw, Pairs)) or fits(value, types):
            break
    return value


def _mutate_inside(body: dict[str, Any], rng: random.Random, costly: bool) -> str:
    """Changes one entry somewhere inside the body; returns its path."""
    places = list(_places(body, ()))
    path = rng.choice(places)
    parent: Any = body
    for step in path[:-1]:
        parent = parent[step]
    last = path[-1]
    action = rng.randrange(6)
    if action == 0:
        del parent[last]
    elif action == 1 and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
    elif action == 1:
        parent[rng.choice(ELSEWHERE)] = hostile(rng)
    elif action == 2:
        parent[last] = None
    elif action == 3:
        parent[last] = rng.choice((long_value, nested))(rng, costly)
    elif action == 4:
        other: Any = body
        for step in rng.choice(places):
            other = other[step]
        parent[last] = copy.deepcopy(other)
    else:
        parent[last] = hostile(rng, costly)
    return ".".join(map(str, path))


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for number, (key, item) in enumerate(entries):
        if number >= 30:
            return
        yield (*path, key)
        yield from _places(item, (*path, key))


def _as_text(body: dict[str, Any], rng: random.Random, costly: bool) -> Made:
    """The body as bytes that are not quite JSON in UTF-8."""
    text = encode(body)
    data = text.encode(errors="surrogatepass")
    at = rng.randrange(len(data) + 1)
    broken = rng.choice((b"\xff", b"\x00", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"{"))
    kinds = {
        "cut off": data[:at],
        "a byte more": data[:at] + broken + data[at:],
        "a byte changed": data[: max(0, at - 1)] + bytes([rng.randrange(256)]) + data[at:],
        "BOM": b"\xef\xbb\xbf" + data,
        "UTF-16": text.encode("utf-16", errors="surrogatepass"),
        "UTF-16 without BOM": text.encode("utf-16-le", errors="surrogatepass"),
        "UTF-32": text.encode("utf-32", errors="surrogatepass"),
        "Latin-1": data + "é".encode("latin-1"),
        "twice": data + data,
        "trailing text": data + b" x",
        "white space": b" \r\n\t" * 300 + data + b"\n" * 300,
        "empty": b"",
        "a scalar": encode(hostile(rng, costly)).encode(errors="surrogatepass"),
        "in a list": b"[" + data + b"]",
        "zeros": b"\x00" * rng.choice((1, 1000, 100_000)),
        "brackets": b"[" * rng.choice((100, 10_000, 1_000_000 if costly else 50_000)),
        "too large": b'{"prompt":"' + b"x" * (5_000_000 if costly else 50_000) + b'"}',
    }  # fmt: skip
    name = rng.choice(sorted(kinds))
    return Made(kinds[name], f"text: {name}", None)
