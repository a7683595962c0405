"""From a family's tensor names to the leaves that loading fills."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jax.sharding import Mesh

from jinfer.layers.stack import is_stacked, layers_of
from jinfer.mesh import named_sharding
from jinfer.models.checkpoint import HEAD, TABLE, TEXT, Naming, naming_of
from jinfer.models.decoder import ModelSpec, skeleton
from jinfer.models.hf_config import ModelConfig
from jinfer.weights.load import Leaf

# What modules computed once and older checkpoints kept: rotary frequencies and angles, masks, positions.
BUFFER = re.compile(
    r"(?:.*\.)?(?:\w*inv_freq|_?(?:cos|sin)_cached?|masked_bias|(?:self_attn|attn|attention)\.bias|position_ids)"
)
Sources = tuple[tuple[str, tuple[int, ...]], ...]
Shape = tuple[int, ...]


def is_buffer(name: str) -> bool:
    """True for a tensor that holds no parameter of any model, but what its code computed from config.json."""
    return BUFFER.fullmatch(name) is not None


@dataclass(frozen=True)
class Recipe:
    """How one parameter (of one layer) is made: tensor names with shapes, and the function of those tensors.

    otherwise: the recipe for checkpoints that lack the first of these tensors and have that one's.
    """

    sources: Callable[[ModelConfig, Shape], Sources]
    build: Callable[[ModelConfig, Shape], Callable[[list[np.ndarray]], np.ndarray]]
    otherwise: Recipe | None = None

    def or_else(self, other: Recipe) -> Recipe:
        """This recipe, or the other where the checkpoint lacks this one's first tensor and has the other's."""
        return replace(self, otherwise=other)


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


def split_qkv(name: str) -> Recipe:
    """One tensor [(H + 2 * K) * D, ...], queries then keys then values, as `fuse_qkv` makes it."""
    parts = fuse_qkv("{}")

    def sources(config: ModelConfig, shape: Shape) -> Sources:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        return ((name, (heads * config.head_dim, *shape[3:])),)

    def build(config: ModelConfig, shape: Shape) -> Callable[[list[np.ndarray]], np.ndarray]:
        query, size = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        fuse = parts.build(config, shape)
        return lambda t: fuse(np.split(t[0], [query, query + size]))

    return Recipe(sources, build)


def repeat_heads(name: str) -> Recipe:
    """[K * D] as [K', D]; K' > K repeats each KV head for its devices."""

    def build(config: ModelConfig, shape: Shape) -> Callable[[list[np.ndarray]], np.ndarray]:
        copies = shape[0] // config.num_key_value_heads
        return lambda t: np.repeat(t[0].reshape(-1, shape[1]), copies, axis=0)

    return Recipe(lambda config, shape: ((name, (config.num_key_value_heads * shape[1],)),), build)


def split_heads(name: str) -> Recipe:
    """[H * D] as [H, D]."""
    return Recipe(
        lambda config, shape: ((name, (shape[0] * shape[1],)),),
        lambda config, shape: lambda t: t[0].reshape(shape),
    )


def split_pair(name: str) -> Recipe:
    """One tensor [2 * F, ...] as [2, F, ...]."""
    return Recipe(
        lambda config, shape: ((name, (2 * shape[1], *shape[2:])),),
        lambda config, shape: lambda t: t[0].reshape(shape),
    )


def table_or_head() -> Recipe:
    """The embeddings; of a tied model the checkpoint may have the head alone."""
    head = Recipe(
        lambda config, shape: ((HEAD if config.tie_word_embeddings else TABLE, shape),),
        lambda config, shape: lambda t: t[0],
    )
    return plain(TABLE).or_else(head)


# The names that most checkpoints in Hugging Face's format have; a family states only what it names otherwise.
TOP: Mapping[str, Recipe] = {
    "embedding": table_or_head(),
    "norm.weight": plain("model.norm.weight"),
    "norm.bias": plain("model.norm.bias"),
    "head": plain(HEAD),
    "head_bias": plain("lm_head.bias"),
}
LAYER: Mapping[str, Recipe] = {
    "attention_norm.weight": plain("input_layernorm.weight"),
    "attention_norm.bias": plain("input_layernorm.bias"),
    "attention.qkv.weight": fuse_qkv("self_attn.{}_proj.weight"),
    "attention.qkv.bias": fuse_qkv("self_attn.{}_proj.bias"),
    "attention.q_norm.weight": plain("self_attn.q_norm.weight"),
    "attention.k_norm.weight": plain("self_attn.k_norm.weight"),
    "attention.sinks": plain("self_attn.sinks"),
    "attention.out.weight": split_heads_in("self_attn.o_proj.weight"),
    "attention.out.bias": plain("self_attn.o_proj.bias"),
    "mlp_norm.weight": plain("post_attention_layernorm.weight"),
    "mlp_norm.bias": plain("post_attention_layernorm.bias"),
    "mlp.gate_up.weight": stack_pair("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.gate_up.bias": stack_pair("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.down.weight": plain("mlp.down_proj.weight"),
    "mlp.down.bias": plain("mlp.down_proj.bias"),
}


@dataclass(frozen=True)
class WeightMap:
    """A family's names. `top` by parameter path; `layer` by path inside a layer, under `layer_prefix`.

    Both are given as what differs from `TOP` and `LAYER`. Entries for parameters that a model lacks are not used.
    ignores_more_layers: checkpoints may have layers beyond the model's last, which predict several tokens ahead.
    """

    top: Mapping[str, Recipe] = field(default_factory=dict)
    layer_prefix: str = "model.layers.{}."
    layer: Mapping[str, Recipe] = field(default_factory=dict)
    ignores_more_layers: bool = False

    def leaves(self, spec: ModelSpec, mesh: Mesh, names: Collection[str] | None = None) -> list[Leaf]:
        """Every parameter of the spec's decoder with its sources and sharding.

        names: the checkpoint's tensors, which decide between recipes; None: the first recipe of each.
        """
        result = []
        naming = self.naming(names or ())
        for path, param in skeleton(spec)[2].items():
            abstract = param.get_value()
            shape = tuple(abstract.shape)
            sources, build, layers = self._made_of(spec.config, path, shape, names, naming)
            result.append(
                Leaf(
                    path=path,
                    shape=shape,
                    dtype=abstract.dtype,
                    sources=sources,
                    build=build,
                    sharding=named_sharding(mesh, param.get_metadata()["logical_axes"], shape),
                    layers=len(layers) if is_stacked(path) else 0,
                )
            )
        return result

    def names(self, spec: ModelSpec) -> set[str]:
        """The tensors that a checkpoint of the spec's decoder has, by the first recipe of each parameter."""
        shapes = {path: tuple(param.get_value().shape) for path, param in skeleton(spec)[2].items()}
        made_of = [
            self._made_of(spec.config, path, shape, None, Naming())[0] for path, shape in shapes.items()
        ]
        return {name for sources in made_of for name, _ in sources}

    def naming(self, names: Collection[str]) -> Naming:
        """The prefixes that a checkpoint with these tensors has."""
        return naming_of(names, self.layer_prefix.partition("{}")[0])

    def _made_of(
        self, config: ModelConfig, path: str, shape: Shape, names: Collection[str] | None, naming: Naming
    ) -> tuple[Sources, Callable[[list[np.ndarray]], np.ndarray], tuple[int, ...]]:
        """(tensors of all its layers, how one layer is built from its own, the layers) of one parameter."""
        layers, inside = layers_of(path, shape)
        inner = shape[1:] if is_stacked(path) else shape
        recipe = {**LAYER, **self.layer}[inside] if layers else {**TOP, **self.top}[path]
        prefixes = [self.layer_prefix.format(i) for i in layers] or [""]
        if names is not None:
            recipe = self._present(recipe, config, inner, prefixes[0], names, naming)
        parts = recipe.sources(config, inner)
        sources = tuple((naming.stored(prefix + name), size) for prefix in prefixes for name, size in parts)
        return sources, recipe.build(config, inner), layers

    @staticmethod
    def _present(
        recipe: Recipe, config: ModelConfig, inner: Shape, prefix: str, names: Collection[str], naming: Naming
    ) -> Recipe:
        """The first of a recipe and its alternatives whose first tensor is there; if none is, the recipe itself."""
        one: Recipe | None = recipe
        while one is not None:
            if naming.stored(prefix + one.sources(config, inner)[0][0]) in names:
                return one
            one = one.otherwise
        return recipe

    def ignores(self, name: str, config: ModelConfig, naming: Naming) -> bool:
        """True for tensors that may be in a checkpoint without being used; `name` is the checkpoint's own."""
        usual = naming.usual(name)
        before, _, after = self.layer_prefix.partition("{}")
        layer = usual.removeprefix(before).partition(after)[0]
        is_beyond = usual.startswith(before) and layer.isdigit() and int(layer) >= config.num_hidden_layers
        return (
            is_buffer(usual)
            or (config.tie_word_embeddings and usual == HEAD)
            or (self.ignores_more_layers and is_beyond)
            or (config.is_part and TEXT not in name and not name.startswith(naming.head))
        )
