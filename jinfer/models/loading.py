"""From a model's name to its parameters on the mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jinfer.config import EngineConfig
from jinfer.errors import ConfigError, ModelError
from jinfer.layers.moe import MoESpec
from jinfer.layers.parameter import Build
from jinfer.mesh import make_mesh, named_sharding
from jinfer.models.checkpoint import with_head_of, with_saved_head
from jinfer.models.decoder import ModelSpec, Params, skeleton
from jinfer.models.family import family_of
from jinfer.models.hf_config import ModelConfig, read_config
from jinfer.models.refit import refit_kv_heads
from jinfer.models.size import refuse_oversized
from jinfer.weights.hub import resolve_model
from jinfer.weights.load import load_leaves
from jinfer.weights.safetensors_source import open_safetensors


@dataclass(frozen=True)
class LoadedModel:
    """A model on its mesh."""

    params: Params
    mesh: Mesh
    folder: Path

    @property
    def spec(self) -> ModelSpec:
        return self.params.spec

    @property
    def config(self) -> ModelConfig:
        return self.params.spec.config


def compute_dtype(asked: str, stored: str | None, platform: str) -> Any:
    """The dtype of weights and activations: as asked; else float32 on CPU and the checkpoint's own elsewhere.

    Raises:
      ConfigError: the platform does not compute it.
    """
    if asked == "float16" and platform == "tpu":
        raise ConfigError("dtype is float16, which TPUs do not compute: use bfloat16, or leave it to auto")
    if asked != "auto":
        return jnp.dtype(asked)
    if platform == "cpu":
        return jnp.dtype("float32")
    # float16 has too little range for the residual stream of many models; accelerators compute bfloat16 as fast.
    return jnp.dtype("float32" if stored == "float32" else "bfloat16")


def make_spec(config: ModelConfig, engine: EngineConfig, platform: str) -> ModelSpec:
    """How `engine` builds the model on `platform` ("cpu", "gpu" or "tpu").

    Raises:
      ConfigError: the heads, or whole experts, cannot be divided among the devices.
    """
    tensor, heads, kv_heads = (
        engine.tensor_parallel_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    if heads % tensor or (kv_heads % tensor and tensor % kv_heads):
        raise ConfigError(
            f"tensor_parallel_size is {tensor} and the model has {heads} attention heads and {kv_heads} KV heads: "
            "it must divide the first, and divide the second or be a multiple of it"
        )
    if engine.enable_expert_parallel:
        _check_whole_experts(
            config, f"enable_expert_parallel is set with tensor_parallel_size {tensor}", tensor
        )
    if engine.expert_parallel_size > 1:
        size = engine.expert_parallel_size
        _check_whole_experts(config, f"expert_parallel_size is {size}", size)
    loop = engine.layer_loop
    return ModelSpec(
        config=config,
        build=Build(
            dtype=compute_dtype(engine.dtype, config.dtype, platform),
            weight_first=platform == "cpu",
            tensor_parallel=tensor,
            expert_parallel=engine.expert_parallel_size,
            experts_over_tensor=engine.enable_expert_parallel,
            platform=platform,
        ),
        scan=loop == "scan" or (loop == "auto" and platform == "tpu"),
    )


def _check_whole_experts(config: ModelConfig, asked: str, parts: int) -> None:
    counts = {layer.mlp.router.num_experts for layer in config.layers if isinstance(layer.mlp, MoESpec)}
    if not counts:
        raise ConfigError(f"{asked} and the model has no experts: leave it out")
    for count in counts:
        if count % parts:
            raise ConfigError(
                f"{asked} and the model has {count} experts: it must divide them, or be left out"
            )


def load_model(engine: EngineConfig, *, progress: bool = False) -> LoadedModel:
    """Loads the model that the configuration names onto its mesh.

    Raises:
      ModelError: the folder, its config.json or its weights cannot be used; names what is wrong.
      ConfigError: the options do not fit the model or the machine.
    """
    folder = resolve_model(engine.model, engine.revision)
    config = read_config(folder)
    mesh = make_mesh(engine.tensor_parallel_size, expert=engine.expert_parallel_size)
    platform = mesh.devices.flat[0].platform
    spec = make_spec(config, engine, "gpu" if platform in ("cuda", "rocm") else platform)
    refuse_oversized(config)
    if _is_orbax(folder, engine.load_format):
        from jinfer.weights.orbax_store import read_meta, restore_orbax

        spec = replace(spec, config=with_saved_head(config, read_meta(folder).get("head")))
        arrays = restore_orbax(folder, targets(spec, mesh), refit=refit_kv_heads, progress=progress)
    else:
        family = family_of(config.model_type).weights
        source = open_safetensors(folder)
        try:
            naming = family.naming(source.names())
            refuse_oversized(config, source, naming)
            config = with_head_of(config, naming, source)
            spec = replace(spec, config=config)
            arrays = load_leaves(
                family.leaves(spec, mesh, set(source.names())),
                source,
                ignored=lambda name: family.ignores(name, config, naming),
                progress=progress,
            )
        finally:
            source.close()
    return LoadedModel(Params(arrays, spec), mesh, folder)


def targets(spec: ModelSpec, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter by path."""
    result = {}
    for path, param in skeleton(spec)[2].items():
        abstract = param.get_value()
        sharding = named_sharding(mesh, param.get_metadata()["logical_axes"], abstract.shape)
        result[path] = jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=sharding)
    return result


def _is_orbax(folder: Path, load_format: str) -> bool:
    from jinfer.weights.orbax_store import is_orbax_folder

    found = is_orbax_folder(folder)
    if load_format == "orbax" and not found:
        raise ModelError(f"{folder} holds no orbax checkpoint: make one with python -m tools.convert")
    return found and load_format != "safetensors"
