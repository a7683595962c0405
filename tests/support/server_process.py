"""Server processes for tests: start one, wait until it is ready, end it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = [sys.executable, "-m", "tests.support.fake_server"]
CACHE = ROOT / ".cache" / "jax-tests"
START_SECONDS = 240.0  # a cold compile on a machine that has other work


class Process:
    """A running server. `url` once it has said that it is ready."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        watchdog = threading.Timer(START_SECONDS, self.popen.kill)
        watchdog.start()
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        watchdog.cancel()
        found = re.search(r"ready.* (http://[\d.]+:(\d+)) serves", line)
        if found is None:
            self.popen.kill()
            self.popen.wait()
            self._reader.join()
            raise AssertionError(f"the server said {line!r}\n{''.join(self.errors)}")
        self.url, self.port = found[1], int(found[2])

    def _read_errors(self) -> None:
        assert self.popen.stderr is not None
        self.errors.extend(self.popen.stderr)

    def end(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        self.popen.send_signal(signal.SIGTERM)
        return self.leave()

    def leave(self) -> int:
        status = self.popen.wait(timeout=60)
        self._reader.join()
        for stream in (self.popen.stdout, self.popen.stderr):
            assert stream is not None
            stream.close()
        return status

    def running(self) -> float:
        text = httpx.get(self.url + "/metrics").text
        return float(re.findall(r"^jinfer:num_requests_running\S* (\S+)$", text, re.MULTILINE)[0])

    def until_running(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while self.running() != count:
            assert time.monotonic() < deadline, f"{self.running()} requests run, not {count}"
            time.sleep(0.02)


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[Process]:
    process = Process(command)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
        process.leave()


def read_until(stream: Iterator[bytes], text: bytes) -> bytes:
    data = b""
    while text not in data:
        data += next(stream)
    return data
