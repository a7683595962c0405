"""A server process of the command's own, and the figures that the system keeps about it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

START_SECONDS = 300.0
STOP_SECONDS = 60.0
# Small enough that a request of the greatest length takes little, large enough that several run in one step.
FLAGS = (
    "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--max-model-len", "512",
    "--scheduling-policy", "priority",
)  # fmt: skip


class Server:
    """A running server. Raises RuntimeError if it does not become ready.

    log: the file that has what it writes; None: a file that goes with it.
    """

    def __init__(self, model: str, flags: Sequence[str], log: str | None = None) -> None:
        command = [sys.executable, "-m", "jinfer.serve", "--model", model, "--port", "0", *FLAGS, *flags]
        self._log = open(log, "wb") if log else tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log
        )
        watchdog = threading.Timer(START_SECONDS, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        watchdog.cancel()
        found = re.search(r"http://([\d.]+|localhost):(\d+)", line)
        if found is None:
            log = self.log()[-1500:]
            self.stop()
            raise RuntimeError(f"the server did not start: {log}")
        self.address = ("127.0.0.1", int(found[2]))

    def log(self) -> str:
        """What it has written so far."""
        return Path(self._log.name).read_text(errors="replace")

    def tracebacks(self) -> list[str]:
        """The last frame and the error of each traceback in the log."""
        found, frame, inside = [], "", False
        for line in self.log().splitlines():
            if line.startswith("Traceback "):
                inside = True
            elif inside and line.startswith("  File "):
                frame = line.strip()
            elif inside and line and not line.startswith(" "):
                found.append(f"{line[:300]} ({frame})")
                inside = False
        return found

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> int:
        """Ends it; returns its exit status, which is 0 if it drained as it should."""
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._log.close()


@contextlib.contextmanager
def started(model: str, flags: Sequence[str], log: str | None = None) -> Iterator[Server]:
    server = Server(model, flags, log)
    try:
        yield server
    finally:
        server.stop()


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has had, or None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int | None:
    """Resident bytes of a process, or None where the system does not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
