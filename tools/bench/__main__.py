"""`python -m tools.bench COMMAND`: how fast jinfer is, on this machine and against others.

    offline   a batch of requests through the engine in this process; --compare hf: and through transformers
    stream    one request at a time: what a single user sees; --compare hf likewise
    serve     load over HTTP on jinfer.serve, started here, or on any OpenAI-compatible --url; --compare URL: and on
              another server
    connections
              what thousands of silent connections do to everybody else
    model     write a random-weight Llama folder of 9 or 100 million parameters

Each command has --help. --config names a YAML preset (configs/bench/), flags override it. Exit status: 0; 1 if a goal
is missed or the benchmark fails; 2 if a setting is wrong.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jinfer import EngineConfig, UserError
from jinfer.cli import parse_args
from tools.bench import settings as s

PROGRAM = "python -m tools.bench"
PARTS: dict[str, dict[str, type]] = {
    "offline": {"workload": s.Workload, "measurement": s.OfflineMeasurement, "engine": EngineConfig},
    "stream": {"workload": s.StreamWorkload, "measurement": s.EngineMeasurement, "engine": EngineConfig},
    "serve": {"workload": s.Workload, "load": s.Load, "measurement": s.Measurement},
    "connections": {"crowd": s.Crowd},
    "model": {"model": s.ModelSettings},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    assert __doc__ is not None
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    command = arguments.pop(0)
    if command not in PARTS:
        print(f"{PROGRAM}: error: unknown command {command!r}, expected {', '.join(PARTS)}", file=sys.stderr)
        return 2
    parts = parse_args(PARTS[command], arguments, prog=f"{PROGRAM} {command}")
    _quiet()
    try:
        if command == "connections":
            from tools.bench.commands import say
            from tools.bench.connections import run_connections

            text, is_good = run_connections(parts["crowd"], say)
            print(text)
            return 0 if is_good else 1
        report = _run(command, parts)
        if report is None:
            return 0
        return _tell(report, parts["measurement"])
    except UserError as error:
        print(f"{PROGRAM} {command}: error: {error}", file=sys.stderr)
        return 1


def _run(command: str, parts: dict[str, Any]) -> Any:
    from tools.bench import commands

    if command == "model":
        commands.run_model(parts["model"])
        return None
    if command == "serve":
        return commands.run_serve(parts["workload"], parts["load"], parts["measurement"])
    concurrency, title = (1, "single stream") if command == "stream" else (None, "offline throughput")
    return commands.run_engine(title, parts["workload"], parts["measurement"], parts["engine"], concurrency)


def _tell(report: Any, measurement: s.Measurement) -> int:
    print(report.text(), flush=True)
    # After the table: a picture that fails costs no figures.
    if measurement.json is not None:
        report.write_json(measurement.json)
    if measurement.plot is not None:
        from tools.bench.plot import write_plot

        write_plot(report, measurement.plot)
    return 0 if all(goal.is_met for goal in report.goals) else 1


def _quiet() -> None:
    """Libraries' chatter is not part of a report; their errors are raised."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    sys.exit(main())
