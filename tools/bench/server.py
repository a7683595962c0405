"""Starts jinfer's server as a process of its own, on a free port, and stops it."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx

from jinfer import ConfigError

STOP_SECONDS = 40  # the server's own drain limit is 30
LOG_TAIL = 1500  # characters of the server's log that are shown when it fails


@contextmanager
def started_server(
    model: str | None, name: str | None, flags: str, api_key: str | None, start_timeout: float
) -> Iterator[tuple[str, int]]:
    """URL and process id of a server that is ready; it ends with the context.

    Args:
      name: of the model in the API; None leaves it to the server, as does model.
      flags: more of them, as on a command line.

    Raises:
      ConfigError: it ended, or was not ready in time; with the end of its log.
    """
    port = _free_port()
    command = [sys.executable, "-m", "jinfer.serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-prompt-tokens-details"]
    command += ["--model", model] if model is not None else []
    command += ["--served-model-name", name] if name is not None else []
    command += ["--api-key", api_key] if api_key is not None else []
    try:
        command += shlex.split(flags)
    except ValueError as error:
        raise ConfigError(f"server_args is {flags!r}, which is not a command line: {error}") from error
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(process, url, log, start_timeout)
            yield url, process.pid
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with httpx.Client(timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ConfigError(f"jinfer.serve ended with status {process.returncode}: {_tail(log)}")
            try:
                if client.get(f"{url}/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(0.2)
    raise ConfigError(
        f"jinfer.serve was not ready after {timeout:g} s: raise start_timeout. The end of its log: {_tail(log)}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode("utf-8", "replace")[-LOG_TAIL:].strip() or "(empty)"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
