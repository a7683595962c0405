"""The processes that render chat templates, from the engine's side: started when needed, kept warm, replaced when they
end. At most one request is in a process at a time, and a process that ends takes no other request with it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jinfer.errors import QueueFullError, RequestFailedError
from jinfer.interrupts import held_signals, uninterrupted

WORKERS = 2
WAIT_SECONDS = 30.0  # for a process that is free
SLACK_SECONDS = (
    20.0  # of waiting for an answer, beyond the CPU time that it may take: the machine may be busy
)
LOOK_SECONDS = 0.5  # a longer wait can be interrupted; a shorter one costs no process
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "TZ",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONHOME",
    "SYSTEMROOT",
)
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
    "from jinfer.text.worker import main; main(int(sys.argv[1]))"
)


class WorkerDied(Exception):
    """The process ended before it answered; `signal` ended it, 0 where none did."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class _Worker:
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, str(theirs.fileno()), json.dumps(_path())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        self._is_ready = False
        self.known: set[int] = set()  # templates that were sent

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, data: bytes, seconds: float) -> dict[str, Any]:
        """The answer. Raises WorkerDied, RequestFailedError where the process did not even start, and what the handler
        of a signal raises that comes during a long wait."""
        self._wait_until_ready()
        try:
            self._connection.send_bytes(data)
            if not _wait_for(self._connection.poll, seconds):
                self.close()
                raise WorkerDied(signal.SIGPROF)
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self.close()
            raise WorkerDied(max(0, -(self._process.returncode or 0))) from None

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        with contextlib.suppress(EOFError, OSError):
            self._is_ready = bool(
                _wait_for(self._connection.poll, SLACK_SECONDS) and self._connection.recv_bytes()
            )
        if not self._is_ready:
            self.close()
            raise RequestFailedError(
                f"the process that renders chat templates did not start (exit status {self._process.returncode}): see "
                f"whether {sys.executable} runs, can import jinja2 and may use some 200 MB of memory"
            )

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        try:
            # It ends by itself when its socket closes, unless it is deep in a template.
            self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RenderPool:
    """Up to `size` processes."""

    def __init__(self, size: int = WORKERS) -> None:
        self._size = size
        self._reset()

    @uninterrupted
    def start(self) -> None:
        """Starts a process, so that the first request need not wait for it."""
        worker = self._take()
        self._give(worker)

    @uninterrupted
    def ask(self, key: int, template: Mapping[str, Any], request: Any, seconds: float) -> dict[str, Any]:
        """What a process makes of a request.

        Args:
          key: stands for the template: its text is sent once to each process.
          template: arguments of `rendering.Renderer`.
          request: as `Renderer.render` takes it; None only studies the template.
          seconds: of CPU time that it may take.

        Raises:
          WorkerDied: the process broke a limit, or somebody ended it.
          QueueFullError: all processes were busy for long.
          RequestFailedError: no process can be started.
        """
        worker = self._take()
        try:
            answer: dict[str, Any] = {"unknown": True}
            if key in worker.known:
                answer = worker.ask(_job(key, None, request), seconds + SLACK_SECONDS)
            if answer.get("unknown"):
                answer = worker.ask(_job(key, template, request), seconds + SLACK_SECONDS)
                worker.known.add(key)
        except BaseException:
            # An interrupt too leaves a process whose next answer would be this request's.
            worker.close()
            self._give(None)
            raise
        if answer.pop("last", False):
            worker.close()
            self._give(None)
        else:
            self._give(worker)
        return answer

    def close(self) -> None:
        """Ends the processes that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def pids(self) -> list[int]:
        """Of the processes that are idle."""
        with self._lock:
            return [worker.pid for worker in self._idle]

    def _take(self) -> _Worker:
        if os.getpid() != self._owner:
            self._reset()  # after a fork the sockets are the parent's
        if not _wait_for(lambda seconds: self._free.acquire(timeout=seconds), WAIT_SECONDS):
            raise QueueFullError(
                "every process that renders chat templates is busy: send the request again later"
            )
        try:
            while True:
                with self._lock:
                    worker = self._idle.pop() if self._idle else None
                if worker is None:
                    return _Worker()
                if worker.is_alive:
                    return worker
                worker.close()
        except OSError as error:
            self._free.release()
            raise RequestFailedError(
                f"the process that renders chat templates cannot be started: {error}"
            ) from error
        except BaseException:
            self._free.release()
            raise

    def _give(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._idle.append(worker)
        self._free.release()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._free = threading.Semaphore(self._size)


# Made here: two threads at the first use would make two, and a lock would stay taken where a signal handler raises just
# after it is. It starts no process before it is asked.
_SHARED = RenderPool()
atexit.register(_SHARED.close)


def shared_pool() -> RenderPool:
    """The pool of this process: templates share it, however many there are."""
    return _SHARED


def _wait_for(waits: Callable[[float], bool], seconds: float) -> bool:
    """Whether what `waits` looks for came in so many seconds. Signals that are held back meanwhile are delivered."""
    end = time.monotonic() + seconds
    while not waits(max(0.0, min(LOOK_SECONDS, end - time.monotonic()))):
        if time.monotonic() >= end:
            return False
        with held_signals() as signals:
            signals.deliver()
    return True


def _job(key: int, template: Mapping[str, Any] | None, request: Any) -> bytes:
    return json.dumps({"key": key, "template": template, "request": request}).encode()


def _path() -> list[str]:
    """Where the process finds what it imports: this package and jinja2, in their places here."""
    import jinja2

    homes = [str(Path(__file__).parents[2]), str(Path(jinja2.__file__).parents[1])]
    return [*homes, *(path for path in sys.path if path and path not in homes)]


def _environment() -> dict[str, str]:
    """No secret of the server's environment is handed on."""
    return {k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith("LC_")}
