"""Recipes for the weights of mixtures of experts: a tensor per expert, or one tensor for all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jinfer.models.hf_config import ModelConfig
from jinfer.models.weight_map import Recipe, Shape, Sources, plain, stack_pair


def stack_experts(*names: str) -> Recipe:
    """For each expert, whose number replaces {}, one tensor or several: [X, ...], or [X, number of names, ...]."""

    def sources(config: ModelConfig, shape: Shape) -> Sources:
        inner = shape[1:] if len(names) == 1 else shape[2:]
        return tuple((name.format(expert), inner) for expert in range(shape[0]) for name in names)

    def build(config: ModelConfig, shape: Shape) -> Callable[[list[np.ndarray]], np.ndarray]:
        return lambda tensors: np.stack(tensors).reshape(shape)

    return Recipe(sources, build)


def split_gate_up(name: str) -> Recipe:
    """One tensor [X, 2 * F, ...], the gate's rows first, as [X, 2, F, ...]."""
    return Recipe(
        lambda config, shape: ((name, (shape[0], 2 * shape[2], *shape[3:])),),
        lambda config, shape: lambda t: t[0].reshape(shape),
    )


def routed(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Recipe]:
    """Router and experts: published checkpoints have a tensor per expert and product under `block`, others fused ones."""
    each = f"{block}.experts.{{}}."
    return {
        "mlp.router.weight": plain(f"{block}.gate.weight").or_else(plain("mlp.gate.weight")),
        "mlp.experts.gate_up": stack_experts(f"{each}{gate}.weight", f"{each}{up}.weight").or_else(
            split_gate_up("mlp.experts.gate_up_proj")
        ),
        "mlp.experts.down": stack_experts(f"{each}{down}.weight").or_else(plain("mlp.experts.down_proj")),
    }


def shared(block: str) -> dict[str, Recipe]:
    """The dense block beside the experts."""
    return {
        "mlp.shared.gate_up.weight": stack_pair(f"{block}.gate_proj.weight", f"{block}.up_proj.weight"),
        "mlp.shared.gate_up.bias": stack_pair(f"{block}.gate_proj.bias", f"{block}.up_proj.bias"),
        "mlp.shared.down.weight": plain(f"{block}.down_proj.weight"),
        "mlp.shared.down.bias": plain(f"{block}.down_proj.bias"),
    }
