"""Compiles for one target; run by `tools.targets.ask_child`, and answers case by case.

Request: `cases`, or `step` with the arguments of `compile_steps`. One line of JSON per compiled program.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

KERNELS = ("tpu_custom_call", "mosaic_gpu")  # how a kernel shows in a compiled program


def main() -> int:
    request = json.load(sys.stdin)
    from tools import targets

    devices = targets.find(request["target"]).devices()
    if "step" in request:
        from tools.compile_check.step import compile_steps

        step = request["step"]
        for result in compile_steps(Path(step.pop("folder")), devices, **step):
            _answer(asdict(result))
    for case in request.get("cases", []):
        _answer(_compile(case, devices))
    return 0


def _compile(request: dict[str, Any], devices: list[Any]) -> dict[str, Any]:
    from tools.kernel_cases import Case, described, lower, pool_bytes

    start = time.monotonic()
    try:
        case = Case.from_request(request)
        compiled = lower(case, devices).compile()
        with described(devices):
            kv_bytes = pool_bytes(case)
    except Exception as error:  # whatever a compiler raises is this case's result, and the next one goes on
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
    memory = compiled.memory_analysis()
    return {
        "error": None,
        "seconds": time.monotonic() - start,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "kv_bytes": kv_bytes,
        "kernels": sum(compiled.as_text().count(f'custom_call_target="{kernel}') for kernel in KERNELS),
    }


def _answer(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
