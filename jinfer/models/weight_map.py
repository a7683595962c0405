"""From a family's tensor names to the leaves that loading fills."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from jinfer.mesh import named_sharding
from jinfer.models.decoder import ModelSpec, skeleton
from jinfer.models.hf_config import ModelConfig
from jinfer.weights.load import Leaf

Sources = tuple[tuple[str, tuple[int, ...]], ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How one parameter (of one layer) is made: tensor names with shapes, and the function of those tensors."""

    sources: Callable[[ModelConfig, Shape], Sources]
    build: Callable[[ModelConfig, Shape], Callable[[list[np.ndarray]], np.ndarray]]


def plain(name: str) -> Recipe:
    """The tensor as it is."""
    return Recipe(lambda config, shape: ((name, shape),), lambda config, shape: lambda t: t[0])


def split_heads_in(name: str) -> Recipe:
    """[E, H * D] as [E, H, D]."""
    return Recipe(
        lambda config, shape: ((name, (shape[0], shape[1] * shape[2])),),
        lambda config, shape: lambda t: t[0].reshape(shape),
    )


def stack_pair(first: str, second: str) -> Recipe:
    """Two tensors [F, ...] as [2, F, ...]."""
    return Recipe(
        lambda config, shape: ((first, shape[1:]), (second, shape[1:])),
        lambda config, shape: lambda t: np.stack(t),
    )


def fuse_qkv(pattern: str) -> Recipe:
    """q [H * D, ...], k and v [K * D, ...] as [K', G + 2, D, ...]; K' > K repeats each KV head for its devices."""

    def sources(config: ModelConfig, shape: Shape) -> Sources:
        d, rest = config.head_dim, shape[3:]
        sizes = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        sizes["v"] = sizes["k"]
        return tuple((pattern.format(part), (heads * d, *rest)) for part, heads in sizes.items())

    def build(config: ModelConfig, shape: Shape) -> Callable[[list[np.ndarray]], np.ndarray]:
        kv_heads, slots, d, *rest = shape
        copies = kv_heads // config.num_key_value_heads

        def fuse(tensors: list[np.ndarray]) -> np.ndarray:
            q, k, v = tensors
            fused = np.empty(shape, q.dtype)
            fused[:, : slots - 2] = q.reshape(kv_heads, slots - 2, d, *rest)
            for at, part in ((slots - 2, k), (slots - 1, v)):
                fused[:, at] = np.repeat(part.reshape(-1, d, *rest), copies, axis=0)
            return fused

        return fuse

    return Recipe(sources, build)


@dataclass(frozen=True)
class WeightMap:
    """A family's names. `top` by parameter path; `layer` by path inside a layer, under `layer_prefix`."""

    top: Mapping[str, Recipe]
    layer_prefix: str
    layer: Mapping[str, Recipe]
    ignored_suffixes: tuple[str, ...] = ()

    def leaves(self, spec: ModelSpec, mesh: Mesh) -> list[Leaf]:
        """Every parameter of the spec's decoder with its sources and sharding."""
        config, result = spec.config, []
        for path, param in skeleton(spec)[2].items():
            abstract = param.get_value()
            shape = tuple(abstract.shape)
            sharding = named_sharding(mesh, param.get_metadata()["logical_axes"], shape)
            stacked = path.startswith("stack.layer.")
            single = re.fullmatch(r"stack\.layers\.(\d+)\.(.*)", path)
            if stacked:
                recipe, inner = self.layer[path.removeprefix("stack.layer.")], shape[1:]
                layers = range(config.num_hidden_layers)
            elif single:
                recipe, inner = self.layer[single[2]], shape
                layers = range(int(single[1]), int(single[1]) + 1)
            else:
                recipe, inner, layers = self.top[path], shape, None
            names = recipe.sources(config, inner)
            if layers is not None:
                names = tuple(
                    (self.layer_prefix.format(i) + name, size) for i in layers for name, size in names
                )
            result.append(
                Leaf(
                    path=path,
                    shape=shape,
                    dtype=abstract.dtype,
                    sources=names,
                    build=recipe.build(config, inner),
                    sharding=sharding,
                    layers=config.num_hidden_layers if stacked else 0,
                )
            )
        return result

    def ignores(self, name: str, config: ModelConfig) -> bool:
        """True for tensors that may be in a checkpoint without being used."""
        return name.endswith(self.ignored_suffixes) or (
            config.tie_word_embeddings and name == "lm_head.weight"
        )
