"""One decoder layer, from its description. What differs between families is here as data, never as a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Float, Int

from jinfer.layers.attention import Attend, KVKind, LayerIndex, RotaryTables
from jinfer.layers.norm import NormSpec
from jinfer.layers.parameter import Build
from jinfer.layers.rope import Rotary


class AttentionKind(Protocol):
    """What the decoder asks of an attention's description: frozen and hashable, like `AttentionSpec`."""

    @property
    def rotary(self) -> Rotary | None: ...
    @property
    def kv_kind(self) -> KVKind: ...
    def make(self, build: Build, embed: int) -> nnx.Module:
        """A module (x [T, E], rotary tables, attend, cache, layer index) -> ([T, E], cache)."""
        ...


class FeedForwardKind(Protocol):
    """What the decoder asks of a feed-forward block's description: frozen and hashable, like `MLPSpec`."""

    def make(self, build: Build, embed: int) -> nnx.Module:
        """A module (x [T, E], live) -> [T, E]; tokens from `live` on are padding, None: all are real."""
        ...


@dataclass(frozen=True)
class LayerSpec:
    """One layer: x + attention(x), then x + mlp(x), with norms around them.

    pre_norm: a norm before each block, of its input. post_norm: a norm after each block, of its output, before the
    residual is added. parallel: both blocks read one normalised input: x + attention(norm(x)) + mlp(norm(x)).
    residual_multiplier: factor of each block's output.
    """

    attention: AttentionKind
    mlp: FeedForwardKind
    norm: NormSpec
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    residual_multiplier: float = 1.0


class DecoderLayer(nnx.Module):
    """The layer that a `LayerSpec` describes."""

    def __init__(self, spec: LayerSpec, embed: int, build: Build) -> None:
        def norm(there: bool) -> Any:
            return spec.norm.make(build, (embed,)) if there else None

        self.spec = spec
        self.attention: Any = spec.attention.make(build, embed)
        self.mlp: Any = spec.mlp.make(build, embed)
        self.attention_norm = norm(spec.pre_norm)
        self.mlp_norm = norm(spec.pre_norm and not spec.parallel)
        self.attention_post_norm = norm(spec.post_norm)
        self.mlp_post_norm = norm(spec.post_norm)

    def __call__(
        self,
        x: Float[Array, "T E"],
        tables: RotaryTables,
        attend: Attend,
        cache: Any,
        layer: LayerIndex,
        live: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "T E"], Any]:
        entry = _apply(self.attention_norm, x)
        y, cache = self.attention(entry, tables, attend, cache, layer)
        y = self._scaled(_apply(self.attention_post_norm, y))
        if self.spec.parallel:
            return x + y + self._scaled(_apply(self.mlp_post_norm, self.mlp(entry, live))), cache
        x = x + y
        return x + self._scaled(_apply(self.mlp_post_norm, self.mlp(_apply(self.mlp_norm, x), live))), cache

    def _scaled(self, y: Array) -> Array:
        factor = self.spec.residual_multiplier
        return y if factor == 1.0 else y * factor


def _apply(norm: Any, x: Array) -> Array:
    return x if norm is None else norm(x)
