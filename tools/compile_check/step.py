"""The engine's own step, compiled at a real model's size from shapes alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """One step program. Bytes are per device."""

    program: str
    seconds: float
    kv_bytes: int
    alias_bytes: int
    temp_bytes: int
    argument_bytes: int

    @property
    def kv_is_aliased(self) -> bool:
        return self.alias_bytes >= self.kv_bytes


def compile_steps(
    folder: Path, devices: list[Any], *, tensor: int, rows: int, tokens: int, context: int, attention: str
) -> list[Compiled]:
    """Compiles the widest decode step and the widest mixed step of the model that `folder`'s config.json describes.

    devices: described ones; the first `tensor` of them are used.
    rows: running sequences, each of `context` tokens. tokens: of the mixed step.
    """
    from jinfer.config import EngineConfig
    from jinfer.kv_plan import full_plan
    from jinfer.mesh import make_mesh
    from jinfer.models.hf_config import read_config
    from jinfer.models.loading import make_spec
    from jinfer.programs import StepPrograms

    page_size = 32
    engine = EngineConfig(
        model=str(folder),
        tensor_parallel_size=tensor,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        block_size=page_size,
        dtype="bfloat16",
    )
    spec = make_spec(read_config(folder), engine, "tpu" if devices[0].platform == "tpu" else "gpu")
    plan = full_plan(spec, engine, page_size, attention, context)
    programs = StepPrograms(spec, make_mesh(tensor, devices), engine, plan)
    results = []
    for shape in (programs.shape_for(True, rows, rows), programs.shape_for(False, rows, tokens)):
        start = time.monotonic()
        compiled = programs.compile(programs.lower(shape))
        memory = compiled.memory_analysis()
        results.append(
            Compiled(
                program=str(shape),
                seconds=time.monotonic() - start,
                kv_bytes=programs.kv_bytes // tensor,
                alias_bytes=memory.alias_size_in_bytes,
                temp_bytes=memory.temp_size_in_bytes,
                argument_bytes=memory.argument_size_in_bytes,
            )
        )
    return results
