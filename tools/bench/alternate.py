"""Several systems measured in turn: A B A B, so that slow drifts of the machine meet all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tools.bench.figures import RunResult
from tools.bench.workload import BenchRequest

REST_SECONDS = 0.5  # lets the threads of the last system stop spinning before the next one is measured


class System(Protocol):
    """Something that runs a list of requests."""

    name: str

    def warm_up(self, requests: Sequence[BenchRequest]) -> None: ...

    def run(self, requests: Sequence[BenchRequest]) -> RunResult: ...


def alternate(
    systems: Sequence[System],
    make: Callable[[int], list[BenchRequest]],
    repeats: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[RunResult]]:
    """Warms every system up, then runs each `repeats` times, in turn.

    Args:
      make: the requests of a run by its number; 0 is the warm-up's. All systems get the same.
      say: told about every run.
    """
    for system in systems:
        say(f"warming up {system.name}")
        system.warm_up(make(0))
    results: dict[str, list[RunResult]] = {system.name: [] for system in systems}
    for number in range(1, repeats + 1):
        requests = make(number)
        for system in systems:
            time.sleep(REST_SECONDS)
            run = system.run(requests)
            results[system.name].append(run)
            tokens = sum(record.output_tokens for record in run.good)
            say(
                f"run {number} of {repeats}: {system.name}: {tokens} output tokens in {run.seconds:.2f} s, "
                f"{tokens / max(run.seconds, 1e-9):.1f} tokens/s"
            )
    return results
