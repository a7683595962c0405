"""A server process around the fake engine: `python fake_server.py [flags of the server] [--engine FIELD=NUMBER]`."""

import asyncio
import json
import socket
import sys
from typing import Any

from jinfer import ServerConfig
from jinfer.cli import parse_args
from serve.app import create_app
from serve.lifecycle import run_server
from tests.support.fake_engine import FakeAsyncEngine

argv = sys.argv[1:]
engine: Any = FakeAsyncEngine()
while "--engine" in argv:
    at = argv.index("--engine")
    name, _, value = argv[at + 1].partition("=")
    setattr(engine, name, json.loads(value))
    del argv[at : at + 2]
config = parse_args({"server": ServerConfig}, argv)["server"]
sock = socket.create_server(("127.0.0.1", 0), backlog=0)
app, state = create_app(engine, config)
port = sock.getsockname()[1]
ready = lambda: print(f"ready http://127.0.0.1:{port} serves fake", flush=True)  # noqa: E731
sys.exit(asyncio.run(run_server(app, state, sock, ready)))
