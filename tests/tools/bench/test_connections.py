"""`python -m tools.bench connections` against a server that closes the crowd, and one that keeps it."""

from __future__ import annotations

import asyncio

import pytest

from jinfer import ConfigError
from tests.support.inprocess_server import run, running
from tools.bench.connections import run_connections
from tools.bench.settings import Crowd


@pytest.mark.parametrize("seconds", [0.5, 60.0])
def test_a_crowd(seconds):
    async def test():
        async with running(read_timeout=seconds, keep_alive_timeout=seconds) as server:
            url = f"http://127.0.0.1:{server.address[1]}"
            crowd = Crowd(url=url, patience=3.0, idle=5, half_open=7, probes=3)
            report, is_good = await asyncio.to_thread(run_connections, crowd, print)
            assert is_good == (seconds < 1)
            assert f"closed by the server: {12 if is_good else 0} of 12" in report
            for line in report.splitlines()[2:5]:
                assert line.split()[-5] == "0"  # probes failed

    run(test())


def test_what_is_no_server():
    with pytest.raises(ConfigError, match="expected the URL of a server"):
        Crowd(url="localhost:8000")
