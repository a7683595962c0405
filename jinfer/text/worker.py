"""The process that renders chat templates: a template comes with a model, and a model comes from anywhere.

It is started with jinja2 and this package's rendering alone (no jax, no tokenizers), has limits of memory and of CPU
time that the kernel holds, reads requests as JSON from a socket and answers in JSON. It ends when the socket does, or
with the request that broke a limit.
"""

from __future__ import annotations

import gc
import json
import resource
import signal
import sys
from collections import OrderedDict
from multiprocessing.connection import Connection
from typing import Any

from jinfer.errors import RequestError
from jinfer.text.rendering import CANNOT_RENDER, Renderer

MEMORY = 128 * 1024 * 1024  # bytes above what the process starts with, for any request
MEMORY_PER_BYTE = (
    24  # and for each byte of the request: JSON, its objects, their copies and the text made of them
)
SPARE_SECONDS = 0.5  # of CPU time that a single operation may run past the time limit
MAX_TEMPLATES = 16  # kept compiled
TIRED = 64 * 1024 * 1024  # bytes of growth after which the process makes place for a fresh one


def main(descriptor: int) -> None:
    """Serves until the other end closes."""
    # A terminal's Ctrl-C and a manager's SIGTERM reach the whole group; the server drains, and this ends after it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    connection = Connection(descriptor)
    worker = _Worker()
    connection.send_bytes(b"ready")
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        answer = worker.answer(data)
        try:
            connection.send_bytes(answer)
        except OSError:
            return
        if worker.is_tired:
            return


class _Worker:
    def __init__(self) -> None:
        self._renderers: OrderedDict[int, Renderer] = OrderedDict()
        self._base_bytes = _address_space()
        self._base_peak = _peak()
        self.is_tired = False

    def answer(self, data: bytes) -> bytes:
        """The answer to one request; where `is_tired` is true afterwards, it says that it is the last."""
        try:
            _limit_memory(self._base_bytes + MEMORY + MEMORY_PER_BYTE * len(data))
            return self._closed(self._answer(json.loads(data)))
        except MemoryError:
            self._renderers.clear()
            gc.collect()
            self.is_tired = True
            return self._closed(_fault("it needs more memory than a request may take"))
        except RequestError as error:
            return self._closed({"error": str(error), "param": error.param, "code": error.code})
        except Exception as error:
            return self._closed(_fault(f"{type(error).__name__}: {error}"[:500]))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _closed(self, answer: dict[str, Any]) -> bytes:
        self.is_tired |= _peak() - self._base_peak > TIRED
        return json.dumps(answer | {"last": True} if self.is_tired else answer).encode()

    def _answer(self, job: dict[str, Any]) -> dict[str, Any]:
        key, template = job["key"], job.get("template")
        if template is None and key not in self._renderers:
            return {"unknown": True}
        if key not in self._renderers:
            assert template is not None
            self._renderers[key] = Renderer(**template, arm=_arm)
            if len(self._renderers) > MAX_TEMPLATES:
                self._renderers.popitem(last=False)
        self._renderers.move_to_end(key)
        renderer = self._renderers[key]
        answer: dict[str, Any] = {}
        if template is not None and template["needs"] is None:
            answer["needs"] = renderer.needs.to_json()
        if job["request"] is not None:
            try:
                answer["text"], answer["mark"] = renderer.render(job["request"])
            except RequestError as error:
                answer |= {"error": str(error), "param": error.param, "code": error.code}
        return answer


def _fault(reason: str) -> dict[str, Any]:
    return {"error": f"{CANNOT_RENDER}: {reason}", "param": "messages", "code": None}


def _arm(seconds: float) -> None:
    """Lets the kernel end the process if what follows takes longer, in CPU time: Python's own checks cannot interrupt
    one long operation, and on a busy machine a clock on the wall would end the innocent."""
    signal.setitimer(signal.ITIMER_PROF, seconds + SPARE_SECONDS)


def _limit_memory(size: int) -> None:
    if sys.platform != "darwin":  # which has the limit and ignores it
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (size if hard < 0 else min(size, hard), hard))


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 512 * 1024 * 1024


def _peak() -> int:
    """The most bytes that the process had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
