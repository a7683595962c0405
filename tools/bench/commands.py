"""The commands of `python -m tools.bench`, each from settings to a report."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np

from jinfer import ConfigError, EngineConfig
from tools.bench import machine
from tools.bench.alternate import System, alternate
from tools.bench.models import resolve_random, shape_of, write_model
from tools.bench.report import Report
from tools.bench.settings import (
    EngineMeasurement,
    Load,
    Measurement,
    ModelSettings,
    Workload,
    parse_slo,
)
from tools.bench.workload import Vocabulary, make_requests


def say(line: str) -> None:
    """Progress goes to stderr: stdout is the report's."""
    print(line, file=sys.stderr, flush=True)


def run_engine(
    title: str,
    workload: Workload,
    measurement: EngineMeasurement,
    config: EngineConfig,
    concurrency: int | None,
) -> Report:
    """The engine in this process, and transformers if asked for. concurrency: 1 is single-stream."""
    host = machine.look()
    named = config.model
    config = dataclasses.replace(config, model=resolve_random(config.model))
    from tools.bench.inprocess import EngineSystem

    say(f"loading and compiling {named}")
    engine = EngineSystem(config, workload.longest, concurrency)
    host = dataclasses.replace(host, accelerators=machine.accelerators())
    systems: list[System] = [engine]
    dtype = np.dtype(engine.engine.runner.spec.build.dtype).name
    if measurement.compare == "hf":
        systems += _hf_systems(engine, host, measurement, dtype, one_by_one=concurrency == 1)
    runs = alternate(
        systems,
        lambda number: make_requests(workload, engine.vocabulary, variant=number),
        measurement.repeats,
        say,
    )
    settings = _settings(workload, measurement, config) | {"model": named}
    notes = [f"model {named}, {dtype}; {_describe(workload)}"]
    report = Report(title, host, settings, runs, notes=notes)
    report.add_goals(
        min_ratio=measurement.min_ratio,
        min_tokens_per_second=measurement.min_tokens_per_second,
        max_host_ms=measurement.max_host_ms,
        max_kv_waste=measurement.max_kv_waste,
    )
    return report


def _hf_systems(
    engine: Any, host: machine.Machine, measurement: EngineMeasurement, dtype: str, one_by_one: bool
) -> list[System]:
    if host.accelerators:
        raise ConfigError(
            f"compare hf runs transformers on the CPU, and jinfer runs on {host.accelerators[0]}: set "
            "JAX_PLATFORMS=cpu to compare both on the CPU, or compare servers with `serve --compare URL`"
        )
    from tools.bench.hf import HFModel, HFSystem

    say("loading the same folder with transformers")
    hf = HFModel(engine.engine.folder, dtype, measurement.hf_threads)
    return [HFSystem(hf, size, one_by_one) for size in measurement.batch_sizes]


def run_serve(workload: Workload, load: Load, measurement: Measurement) -> Report:
    """A server over HTTP, one that is started here or any other, and a second one if asked for."""
    from tools.bench.client import HTTPSystem, find_server
    from tools.bench.server import started_server

    if measurement.min_ratio is not None and load.compare is None:
        raise ConfigError("min_ratio needs something to compare with: give compare too")
    host = machine.look()
    model = resolve_random(load.model) if load.model is not None else None
    vocabulary = read_vocabulary(model) if load.sends_tokens else None
    with ExitStack() as stack:
        url, pid = load.url, None
        if url is None:
            name = load.served_model_name or load.model
            say(f"starting jinfer.serve with {load.model or 'the bundled model'}")
            url, pid = stack.enter_context(
                started_server(model, name, load.server_args, load.api_key, load.start_timeout)
            )
        main = find_server(url, load.served_model_name, load.api_key, pid)
        systems: list[System] = [HTTPSystem(main, load, "jinfer.serve" if pid else main.name)]
        found = [f"{systems[0].name} serves {main.model}"]
        if load.compare is not None:
            peer = find_server(load.compare, load.compare_model_name, load.api_key)
            name = peer.name if peer.name != systems[0].name else f"{peer.name} again"
            systems.append(HTTPSystem(peer, load, name))
            found.append(
                f"{name} serves {peer.model}" + (f" (version {peer.version})" if peer.version else "")
            )
        runs = alternate(
            systems,
            lambda number: make_requests(
                workload, vocabulary, variant=number, request_rate=load.request_rate
            ),
            measurement.repeats,
            say,
        )
    notes = ["; ".join(found), f"{_describe(workload)}; {_describe_load(load)}"]
    settings = _settings(workload, measurement, load)
    report = Report("serving", host, settings, runs, limits=parse_slo(load.slo), notes=notes)
    report.add_goals(min_ratio=measurement.min_ratio, min_tokens_per_second=measurement.min_tokens_per_second)
    return report


def read_vocabulary(model: str | None) -> Vocabulary:
    """The vocabulary of a model folder, hub id or the bundled model, without loading weights."""
    from jinfer.config import BUNDLED_MODEL
    from jinfer.models.hf_config import read_config
    from jinfer.text import Tokenizer
    from jinfer.weights.hub import resolve_model

    folder = resolve_model(model or BUNDLED_MODEL)
    return Vocabulary(read_config(folder).vocab_size, Tokenizer.from_folder(folder).special_ids)


def run_model(settings: ModelSettings) -> None:
    """Writes a random-weight model."""
    from pathlib import Path

    shape = shape_of(settings.size)
    assert settings.out is not None
    write_model(shape, Path(settings.out), settings.weights_seed)
    print(f"{settings.out}: {shape.num_parameters / 1e6:.1f} million random parameters, float32")


def _settings(*configs: Any) -> dict[str, Any]:
    values = {name: value for config in configs for name, value in vars(config).items()}
    return {name: value for name, value in values.items() if name != "api_key"}


def _describe(workload: Workload) -> str:
    noun = "request" if workload.num_requests == 1 else "requests"
    shared = f" after {workload.shared_prefix_len} shared ones" if workload.shared_prefix_len else ""
    return (
        f"{workload.num_requests} greedy {noun}, prompts of {workload.prompt_len.replace(':', ' to ')} "
        f"tokens{shared}, outputs of {workload.output_len.replace(':', ' to ')}, seed {workload.workload_seed}"
    )


def _describe_load(load: Load) -> str:
    if load.request_rate is not None:
        text = f"Poisson arrivals, {load.request_rate:g} requests/s"
    elif load.concurrency is not None:
        text = f"{load.concurrency} requests in flight"
    else:
        text = "all at once"
    return text + (f"; goodput under {load.slo} ms" if load.slo else "")
