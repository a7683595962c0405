"""`python -m jinfer.serve`: flags -> engine -> HTTP server."""

# ruff: noqa: E402
from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130  # exit status, as shells have it

if __name__ == "__main__":
    # Before the imports, which take longer than Ctrl-C does. Python's own handler raises KeyboardInterrupt wherever
    # the process stands: a traceback, or an abort where the engine's thread is in the middle of a compilation.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))

import contextlib
import dataclasses
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinfer import ConfigError, EngineConfig, JinferError, ServerConfig, UserError, __version__
from jinfer.cli import parse_args
from serve import listen

PROGRAM = "jinfer.serve"
# How soon a thread that waits for Python's lock asks for it. The default, 5 ms, is three decode steps of a small model,
# and the engine's thread would wait that long for each thread that parses or writes JSON.
SWITCH_SECONDS = 0.001
KEY_VARIABLE = "JINFER_API_KEY"
MAX_TEMPLATE_BYTES = 1024 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status: 0 after a drain, 1 if the model cannot be served or
    the engine has failed, 2 if a setting is wrong."""
    started = time.monotonic()
    configs = parse_args(
        {"engine": EngineConfig, "server": ServerConfig},
        argv,
        prog=PROGRAM,
        description="Serves a model over an OpenAI-compatible HTTP API.",
        version=f"jinfer {__version__}",
    )
    engine_config, config = configs["engine"], configs["server"]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("jax", "absl", "orbax", "etils", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        config = _with_environment(config)
        make_template = _template_maker(config.chat_template)
        tls = listen.tls_context(config)
        sock = listen.bind(config)
    except ConfigError as error:
        _fail(error, 2)

    from jinfer import AsyncEngine

    sys.setswitchinterval(SWITCH_SECONDS)
    engine = AsyncEngine(engine_config)
    engine.start()
    _in_background(_start_renderer)
    # The engine's thread loads and compiles outside Python's lock while these import.
    import asyncio

    from serve.app import create_app
    from serve.lifecycle import run_server

    was_ready = False

    def say_ready() -> None:
        nonlocal was_ready
        was_ready = True
        # What is there now stays. A full collection would look at its 300,000 objects and stop every thread for a
        # quarter of a second.
        gc.freeze()
        _in_background(state.prepare_chat_template)
        seconds = time.monotonic() - started
        print(
            f"jinfer ready in {seconds:.1f} s: {listen.url(config, sock)} serves {state.model_name}",
            flush=True,
        )

    try:
        try:
            app, state = create_app(engine, config, make_template)
            status = asyncio.run(run_server(app, state, sock, say_ready, tls))
        finally:
            listen.unlink(config)
    except ConfigError as error:
        _leave(_say(error), 2)
    except UserError as error:
        _leave(_say(error), 1)
    if not was_ready or engine.error is not None:
        _leave(None, status)
    engine.shutdown()
    return status


def _in_background(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True).start()


def _start_renderer() -> None:
    """Starts the process that renders chat templates; one that does not start is reported by the first chat."""
    from jinfer.text.render_pool import shared_pool

    with contextlib.suppress(JinferError):
        shared_pool().start()


def _with_environment(config: ServerConfig) -> ServerConfig:
    """Takes the keys from the environment where no flag and no file has any. Several are separated by spaces."""
    given = os.environ.get(KEY_VARIABLE)
    if given is None or config.api_key:
        return config
    if not given.split():
        # A variable that was to be filled in, and was not: the server would be open by accident.
        raise ConfigError(f"{KEY_VARIABLE} is set and empty: give it a key, or unset it to serve without one")
    return dataclasses.replace(config, api_key=tuple(given.split()))


def _template_maker(path: str | None) -> Callable[[Any], Any] | None:
    """Makes the chat template of a file; its special tokens are those of the tokenizer, which is not loaded yet."""
    if path is None:
        return None
    from jinfer.text import ChatTemplate

    try:
        if Path(path).stat().st_size > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_TEMPLATE_BYTES} bytes, expected a chat template")
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from error
    try:
        ChatTemplate({"default": source})
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from error
    return lambda engine: ChatTemplate({"default": source}, engine.tokenizer.special_tokens)


def _say(error: Exception) -> str:
    return f"{PROGRAM}: error: {' '.join(str(error).split())}"


def _fail(error: Exception, status: int) -> NoReturn:
    print(_say(error), file=sys.stderr)
    sys.exit(status)


def _leave(message: str | None, status: int) -> NoReturn:
    """Ends the process while the engine's thread may be deep in a compilation, which an ordinary exit would crash."""
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
