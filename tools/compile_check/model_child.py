"""Compiles one model's steps for one target; run by `tools.targets.ask_child`. Answers with one line of JSON.

Request: `folder`, `tensor`, `rows`, `tokens`, `context`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

PAGE_SIZE = 32


def main() -> int:
    request = json.load(sys.stdin)
    from tools import targets

    target = targets.find(request["target"])
    print(json.dumps(compile_model(request, target.devices(), target.kind)), flush=True)
    return 0


def compile_model(request: dict[str, Any], devices: list[Any], kind: str) -> dict[str, Any]:
    """The fields of `models.Row` that a compiler finds out. The target's own attention kernel is used where it serves
    the model's heads, plain XLA elsewhere."""
    from pallas_kernels.dispatch import ImplementationError
    from tools.compile_check.step import compile_steps

    folder = Path(request["folder"])
    sizes = {name: request[name] for name in ("tensor", "rows", "tokens", "context")}
    attention = kind
    try:
        decode, mixed = compile_steps(folder, devices, **sizes, attention=attention)
    except ImplementationError:
        attention = "xla"
        decode, mixed = compile_steps(folder, devices, **sizes, attention=attention)
    return {"attention": attention, "decode": asdict(decode), "mixed": asdict(mixed)}


def weight_bytes(folder: Path, tensor: int) -> int:
    """Bytes of the parameters on one of `tensor` devices, in bfloat16."""
    from jax.sharding import NamedSharding

    from jinfer.config import EngineConfig
    from jinfer.mesh import abstract_mesh, partition_spec
    from jinfer.models.decoder import skeleton
    from jinfer.models.hf_config import read_config
    from jinfer.models.loading import make_spec

    engine = EngineConfig(model=str(folder), tensor_parallel_size=tensor, dtype="bfloat16")
    mesh, total = abstract_mesh(tensor), 0
    for param in skeleton(make_spec(read_config(folder), engine, "tpu"))[2].values():
        value = param.get_value()
        spec = partition_spec(param.get_metadata()["logical_axes"], value.shape, mesh)
        total += math.prod(NamedSharding(mesh, spec).shard_shape(value.shape)) * value.dtype.itemsize
    return total


def static_facts(folder: Path, tensor: int) -> dict[str, Any]:
    """What the config alone says: family, parameters, weights of one of `tensor` devices, KV bytes of a token. Needs no
    accelerator's compiler."""
    from jinfer.config import EngineConfig
    from jinfer.kv_plan import full_plan
    from jinfer.models.decoder import skeleton
    from jinfer.models.hf_config import read_config
    from jinfer.models.loading import make_spec

    engine = EngineConfig(model=str(folder), dtype="bfloat16", max_num_seqs=1)
    config = read_config(folder)
    spec = make_spec(config, engine, "tpu")
    longest = config.max_position_embeddings
    plan = full_plan(spec, engine, PAGE_SIZE, "reference", longest)
    windowed = [g for g in plan.groups if g.kind.window is not None]
    return {
        "family": config.model_type,
        "parameters": sum(math.prod(p.get_value().shape) for p in skeleton(spec)[2].values()),
        "weight_bytes": weight_bytes(folder, tensor),
        "kv_bytes_per_token": sum(g.page_bytes for g in plan.groups) // PAGE_SIZE,
        "windowed_kv_bytes_per_token": sum(g.page_bytes for g in windowed) // PAGE_SIZE,
        "windows": sorted({g.kind.window for g in windowed if g.kind.window is not None}),
        "longest": longest,
        "kv_fraction": plan.fraction,
    }


if __name__ == "__main__":
    raise SystemExit(main())
