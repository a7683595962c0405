"""How large the model of a config.json is, before anything of its size is made."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np

from jinfer.errors import ModelError
from jinfer.layers.moe import MoESpec
from jinfer.layers.parameter import Build
from jinfer.models.checkpoint import Naming
from jinfer.models.decoder import ModelSpec, skeleton
from jinfer.models.hf_config import ModelConfig
from jinfer.weights.source import TensorSource

# Far beyond what is published (1e12 parameters; 61 layers of 384 experts), and what no machine holds.
MOST_PARAMETERS = 2**46
MOST_EXPERTS = 2**20
# Smaller differences are found tensor by tensor, with their names.
MARGIN, SMALL = 16, 2**32


def parameters_of(config: ModelConfig) -> int:
    """The number of its parameters. Equal layers are counted once, so depth costs nothing."""
    kinds = Counter(config.layers)
    total = 0
    for i, (layer, count) in enumerate(kinds.items()):
        one = skeleton(ModelSpec(replace(config, layers=(layer,)), Build(), scan=False))[2]
        sizes = {path: math.prod(param.get_value().shape) for path, param in one.items()}
        inside = sum(size for path, size in sizes.items() if path.startswith("stack."))
        total += inside * count + (sum(sizes.values()) - inside if i == 0 else 0)
    return total


def refuse_oversized(
    config: ModelConfig, source: TensorSource | None = None, naming: Naming | None = None
) -> None:
    """Refuses a config that asks for more than any machine has, or for far more than the checkpoint holds.

    Raises:
      ModelError: says what is asked for, and what is there.
    """
    experts = sum(layer.mlp.router.num_experts for layer in config.layers if isinstance(layer.mlp, MoESpec))
    depth = config.num_hidden_layers
    if experts > MOST_EXPERTS:
        raise ModelError(
            f"config.json asks for {experts:,} experts in {depth} layers, expected at most {MOST_EXPERTS:,}: check "
            "its number of experts and num_hidden_layers"
        )
    asked = parameters_of(config)
    size = f"config.json asks for {asked:,} parameters ({2 * asked / 2**40:,.1f} TiB in bfloat16)"
    if asked > MOST_PARAMETERS:
        raise ModelError(
            f"{size}, expected at most {MOST_PARAMETERS:,}: check its sizes, vocab_size to num_hidden_layers"
        )
    if source is None:
        return
    held = sum(_numbers(source, name) for name in source.names())
    if asked > MARGIN * held + SMALL:
        raise ModelError(
            f"{size}, and the checkpoint holds {held:,} numbers: config.json belongs to other weights"
        )
    there = _layers_in(source, naming or Naming())
    if depth > MARGIN * max(there, 4):
        raise ModelError(
            f"config.json asks for {depth:,} layers, and the checkpoint has {there:,}: config.json belongs to other "
            "weights"
        )


def _numbers(source: TensorSource, name: str) -> int:
    packed = 2 if source.dtype(name) == np.uint8 else 1  # four-bit formats keep two in a byte
    return packed * math.prod(source.shape(name))


def _layers_in(source: TensorSource, naming: Naming) -> int:
    """One more than the largest number of a layer."""
    found = (re.match(r"model\.layers\.(\d{1,6})\.", naming.usual(name)) for name in source.names())
    return max((int(match[1]) + 1 for match in found if match), default=0)
