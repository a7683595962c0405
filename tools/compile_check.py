"""Compiles the engine's step for a TPU that is not there, at a real model's size, and says what it will take.

    python -m tools.compile_check [--model llama-3-8b] [--topology v6e:2x2] [--tensor-parallel-size 4] ...

libtpu compiles from a description of the chips; weights and KV are shapes alone. Printed per program: compile
seconds, bytes of KV, of aliased (donated) arrays and of temporaries per device. Exit code 1 if one does not compile
or a KV byte is not updated in place.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"
GIB = 1024**3

# What libtpu wants to know of a machine that it is not on. It must be set before jax is imported.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nothing here touches a chip, so nothing needs the lock on it
}


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


def described_mesh(topology: str, tensor: int) -> Any:
    """A mesh over the first `tensor` devices of a topology such as "v6e:2x2"; none of them has to exist."""
    from jax.experimental import topologies

    from jinfer.mesh import make_mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return make_mesh(tensor, devices)


def compile_steps(
    folder: Path, topology: str, *, tensor: int, rows: int, tokens: int, context: int, attention: str
) -> list[Compiled]:
    """Compiles the widest decode step and the widest mixed step of a model described by `folder`'s config.json.

    rows: running sequences, each of `context` tokens. tokens: of the mixed step.
    """
    from jinfer.config import EngineConfig
    from jinfer.kv_plan import full_plan
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
    spec = make_spec(read_config(folder), engine, "tpu")
    plan = full_plan(spec, engine, page_size, attention, context)
    programs = StepPrograms(spec, described_mesh(topology, tensor), engine, plan)
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


def table(results: list[Compiled]) -> str:
    """A Markdown table, bytes per device."""
    lines = [
        "| program | compile s | arguments GiB | KV GiB | aliased GiB | temporaries MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.program} | {r.seconds:.1f} | {r.argument_bytes / GIB:.3f} | {r.kv_bytes / GIB:.3f} "
        f"| {r.alias_bytes / GIB:.3f} | {r.temp_bytes / 1e6:.1f} |"
        for r in results
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_check", description="Compile the step for a TPU that is not there."
    )
    parser.add_argument(
        "--model", default="llama-3-8b", help="folder with a config.json, or a name in configs/models"
    )
    parser.add_argument("--topology", default="v6e:2x2", help="chips, for instance v5e:2x4 or tpu7x:2x2x1")
    parser.add_argument("--tensor-parallel-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="running sequences")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the mixed step")
    parser.add_argument("--context", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--attention-backend", default="xla", choices=("xla", "tpu"))
    options = parser.parse_args(arguments)
    folder = Path(options.model) if Path(options.model).is_dir() else MODELS / options.model
    accelerator = f"{options.topology.split(':')[0]}-{options.tensor_parallel_size}"
    os.environ.update(TPU_ENVIRONMENT, TPU_ACCELERATOR_TYPE=accelerator)
    try:
        results = compile_steps(
            folder,
            options.topology,
            tensor=options.tensor_parallel_size,
            rows=options.rows,
            tokens=options.tokens,
            context=options.context,
            attention=options.attention_backend,
        )
    except Exception as error:
        print(f"does not compile for {options.topology}: {error}", file=sys.stderr)
        return 1
    print(
        f"{folder.name} on {options.topology}, {options.tensor_parallel_size} devices, {options.rows} rows of"
    )
    print(f"{options.context} tokens, attention {options.attention_backend!r}; bytes per device\n")
    print(table(results))
    if not all(r.kv_is_aliased for r in results):
        print("\nKV is copied: less is aliased than the KV pages take", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
