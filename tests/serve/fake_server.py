"""A server process around the fake engine: `python fake_server.py [flags of the server] [--engine FIELD=NUMBER]`."""

import asyncio
import importlib.util
import json
import socket
import sys
from pathlib import Path

from jinfer import ServerConfig
from jinfer.cli import parse_args
from serve.app import create_app
from serve.lifecycle import run_server

spec = importlib.util.spec_from_file_location("fake", Path(__file__).parent / "conftest.py")
assert spec is not None
assert spec.loader is not None
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)

argv = sys.argv[1:]
engine = fake.FakeAsyncEngine()
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
