"""One request as bytes on a socket, and how its client behaves."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tools.fuzz_server.bodies import Made, make_body
from tools.fuzz_server.endpoints import Endpoint
from tools.fuzz_server.jsontext import encode

Headers = tuple[tuple[bytes, bytes], ...]
JSON: Headers = ((b"Content-Type", b"application/json"),)
PLACES = (
    "/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/tokenizer_info", "/v1/models",
    "/v1/models/tiny", "/v1/models/", "/v1/models/a%2fb", "/v1/models/%00", "/v1/models/%ff", "/v1//models", "/V1/MODELS",
    "/docs", "/v1", "/%2e%2e/%2e%2e/etc/passwd", "/static/../app.py", "/v1/models/" + "x" * 3000, "/?" + "q=1&" * 500,
    "/metrics?name=" + "%00", "/health#x", "/;a=b", "*", "http://other.example/health", "//evil.example/", "/\\", "/%",
)  # fmt: skip
METHODS = (
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"PATCH",
    b"OPTIONS",
    b"TRACE",
    b"get",
    b"FOO",
    b"CONNECT",
)
ODD_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"Accept", b"application/openmetrics-text; version=1.0.0"),
    (b"Accept", b"application/openmetrics-text; version=x.y"),
    (b"Accept", b"application/openmetrics-text;version="),
    (b"Accept", b"application/openmetrics-text; version=" + b"9" * 5000),
    (b"Accept", b"*/*;q=" + b"1" * 400 + b", ;;,=,text/plain;version=1.0.0;escaping=allow-utf-8;q=x"),
    (b"Accept", b"text/plain; version=1.0.0; escaping=\xff"),
    (b"Accept-Encoding", b"gzip, br;q=x"),
    (b"Authorization", b"Bearer \xff\xfe"),
    (b"Authorization", b"Basic YTpi"),
    (b"X-Request-Id", b"x" * 3000),
    (b"X-Request-Id", b"\xe9\x01"),
    (b"X-Request-Id", b'"; DROP'),
    (b"Origin", b"http://evil.example"),
    (b"Host", b"evil.example:99999"),
    (b"Host", b"[::1"),
    (b"X-Forwarded-For", b"127.0.0.1"),
    (b"X-Forwarded-Host", b"evil.example"),
    (b"Upgrade", b"websocket"),
    (b"Upgrade", b"h2c"),
    (b"Connection", b"upgrade, close, keep-alive"),
    (b"Expect", b"100-continue"),
    (b"Expect", b"200-surprise"),
    (b"Range", b"bytes=0-0,-1"),
    (b"Content-Type", b"application/json; charset=utf-16"),
    (b"Content-Type", b"APPLICATION/JSON"),
    (b"Content-Type", b"text/plain"),
    (b"Content-Type", b"multipart/form-data; boundary="),
    (b"Content-Type", b"application/json\x0b"),
    (b"Content-Type", b""),
    (b"Content-Encoding", b"gzip"),
    (b"Content-Encoding", b"identity"),
    (b"Content-Encoding", b"deflate, br"),
    (b"Transfer-Encoding", b"gzip, chunked"),
    (b"Cookie", b"a=" + b"b" * 4000),
    (b"A" * 3000, b"1"),
    (b"X-Long", b"y" * 20_000),
    (b"X y", b"1"),
    (b"X-Bare\rcr", b"1"),
    (b"X-Folded", b"a\r\n b"),
    (b"X-Null", b"a\x00b"),
)
GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET  /  HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    b"GET \xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n{}   ",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 400 + b"\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2;" + b"e" * 40_000 + b"\r\n{}\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 200_000,
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n" * 2000,
    b"\x00" * 10_000,
    b"",
)  # fmt: skip


@dataclass(frozen=True)
class Leave:
    """When the client goes: so many seconds after it sent all, or after so many bytes of the answer.

    reset: with a TCP reset. reads: it takes what comes until then; one that does not leaves the answer unread.
    """

    seconds: float | None = None
    received: int | None = None
    reset: bool = False
    reads: bool = True


@dataclass(frozen=True)
class Case:
    """wire: every byte that is sent. due: HTTP obliges the server to answer. cuts: where sending pauses briefly.

    fields: of the body, if it is an object that can be shrunk and sent again by `with_fields`.
    """

    index: int
    note: str
    method: bytes
    path: str
    headers: Headers
    body: bytes
    wire: bytes
    due: bool = True
    cuts: tuple[int, ...] = ()
    leave: Leave | None = None
    half_close: bool = False
    fields: dict[str, Any] | None = None

    def with_fields(self, fields: dict[str, Any]) -> Case:
        """The same request with another body, by plain framing and a patient client."""
        body = encode(fields).encode(errors="surrogatepass")
        wire = _wire(self.method, self.path, self.headers, body)
        return replace(self, fields=fields, body=body, wire=wire, cuts=(), leave=None, half_close=False)


def make_case(seed: int, index: int, endpoints: Sequence[Endpoint]) -> Case:
    """Request number `index` of a seed."""
    rng = random.Random(f"{seed}:{index}")
    pick = rng.random()
    if pick < 0.03:
        return _garbage(index, rng)
    if pick < 0.13:
        return _without_body(index, rng)
    endpoint = rng.choice(list(endpoints))
    made = make_body(endpoint, rng)
    note = f"{endpoint.path}, {made.note}"
    headers: Headers = ((b"Host", b"localhost"), *JSON)
    if rng.random() < 0.5:
        headers += ((b"Connection", b"close"),)
    case = Case(
        index, note, b"POST", endpoint.path, headers, made.data,
        _wire(b"POST", endpoint.path, headers, made.data), fields=made.fields,
    )  # fmt: skip
    if rng.random() < 0.25:
        case = _odd_transport(case, made, rng)
    return _odd_client(case, rng) if rng.random() < 0.2 else case


def _wire(method: bytes, path: str, headers: Headers, body: bytes, framing: bytes | None = None) -> bytes:
    length = framing if framing is not None else b"Content-Length: %d\r\n" % len(body)
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return (
        method + b" " + path.encode("latin-1", "replace") + b" HTTP/1.1\r\n" + lines + length + b"\r\n" + body
    )


def _garbage(index: int, rng: random.Random) -> Case:
    data = rng.choice(GARBAGE)
    if rng.random() < 0.3 and data:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    leave = Leave(seconds=0.3, reset=rng.random() < 0.3)
    return Case(index, "not quite HTTP", b"GET", "/", (), b"", data, due=False, leave=leave)


def _without_body(index: int, rng: random.Random) -> Case:
    path, method = rng.choice(PLACES), rng.choice(METHODS + (b"GET",) * 8)
    headers: Headers = ((b"Host", b"localhost"),)
    odd = rng.sample(ODD_HEADERS, rng.randrange(3))
    case = Case(
        index, f"{method.decode()} {path[:40]}", method, path, (*headers, *odd), b"",
        _wire(method, path, (*headers, *odd), b"", b""), due=not odd,
        leave=Leave(seconds=0.3) if odd or method in (b"CONNECT", b"get") else None,
    )  # fmt: skip
    if any(name == b"Accept" for name, _ in odd) and len(odd) == 1:
        return replace(case, due=True, leave=None)
    return case


def _odd_transport(case: Case, made: Made, rng: random.Random) -> Case:
    """Another content type or encoding, headers nobody expects, chunks, a wrong length."""
    body, headers = made.data, case.headers
    kind = rng.randrange(6)
    if kind == 0:
        name, value = rng.choice(ODD_HEADERS)
        kept = tuple(each for each in headers if each[0] != name)
        headers = (*kept, (name, value))
        wire = _wire(b"POST", case.path, headers, body)
        return replace(case, note=f"{case.note}; header {name[:20]!r}", headers=headers, wire=wire, due=False,
                       leave=Leave(seconds=2.0))  # fmt: skip
    if kind == 1:
        headers = (*headers, (b"Content-Encoding", b"gzip"))
        body = gzip.compress(body, 1, mtime=0)
        return replace(case, note=f"{case.note}; gzip", headers=headers, body=body,
                       wire=_wire(b"POST", case.path, headers, body))  # fmt: skip
    if kind == 2:
        size = rng.choice((1, 7, 1000, 65_536)) if len(body) < 5000 else 65_536
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in _parts(body, size))
        end = rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX-Trailer: 1\r\n\r\n", b""))
        wire = _wire(b"POST", case.path, headers, chunks + end, b"Transfer-Encoding: chunked\r\n")
        leave = None if end else Leave(seconds=0.3)
        return replace(case, note=f"{case.note}; chunks of {size}", wire=wire, due=bool(end), leave=leave)
    if kind == 3:
        claimed = max(0, len(body) + rng.choice((-1, 1, -5, 1000, 10**7, -len(body))))
        wire = _wire(b"POST", case.path, headers, body, b"Content-Length: %d\r\n" % claimed)
        return replace(case, note=f"{case.note}; length {claimed} of {len(body)}", wire=wire, due=False,
                       leave=Leave(seconds=0.5))  # fmt: skip
    if kind == 4:
        wire = case.wire + case.wire  # the second is answered too, or the connection is closed
        return replace(case, note=f"{case.note}; sent twice", wire=wire)
    method = rng.choice(METHODS)
    path = rng.choice((case.path + "/", case.path + "?a=b", case.path.upper(), "/" + case.path, case.path))
    return replace(case, note=f"{method.decode()} {path}, {made.note}", method=method, path=path,
                   wire=_wire(method, path, headers, body), due=method not in (b"CONNECT", b"get"),
                   leave=Leave(seconds=0.5) if method in (b"CONNECT", b"get") else None)  # fmt: skip


def _parts(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def _odd_client(case: Case, rng: random.Random) -> Case:
    kind = rng.randrange(6)
    reset = rng.random() < 0.4
    if kind == 0:
        at = rng.randrange(len(case.wire) + 1)
        return replace(case, note=f"{case.note}; leaves at byte {at}", wire=case.wire[:at], due=False,
                       leave=Leave(seconds=0.0, reset=reset))  # fmt: skip
    if kind in (1, 2):
        leave = Leave(received=rng.choice((0, 1, 20, 200, 500, 1000, 5000)), reset=reset)
    elif kind == 3:
        leave = Leave(
            seconds=rng.choice((0.0, 0.001, 0.01, 0.05, 0.3)), reset=reset, reads=rng.random() < 0.5
        )
    elif kind == 4:
        return replace(case, note=f"{case.note}; half closed", half_close=True, due=False)
    else:
        cuts = sorted(rng.randrange(len(case.wire) + 1) for _ in range(3))
        return replace(case, note=f"{case.note}; in pieces", cuts=tuple(cuts))
    return replace(case, note=f"{case.note}; leaves", due=False, leave=leave)
