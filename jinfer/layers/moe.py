"""The mixture-of-experts block: a router picks a few experts per token, each a gated feed-forward block of its own.

No token is dropped: the (token, expert) pairs are sorted by expert, each expert multiplies its own rows, however many
they are, and every token sums its experts' outputs in the order in which it chose them.

Dimension letters: X experts, C experts that a token chooses, M = T * C pairs; the rest as elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jinfer.layers.linear import Linear, project
from jinfer.layers.mlp import ACTIVATIONS, MLPSpec
from jinfer.layers.parameter import Build, InStack, parameter
from jinfer.mesh import abstract_mesh, partition_spec
from pallas_kernels.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class RouterSpec:
    """How tokens choose experts, as data.

    score: "softmax" over all experts, "sigmoid" of each, or "softmax_of_chosen": the best logits are chosen first, and
      the softmax is over those alone.
    normalize: the chosen scores are divided by their sum. scale: factor of the weights that come out.
    bias: of the logits. correction: a learned number per expert, added to its score for the choice and not for the
      weight.
    num_groups, top_groups: experts stand in groups, and only those of the best groups can be chosen. A group is worth
      its best expert, or with group_score="top2" the sum of its two best.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"


@dataclass(frozen=True)
class ClampedSwiGLU:
    """(min(max(up, -limit), limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit)."""

    alpha: float
    limit: float

    def __call__(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts, as data.

    feed_forward: of each expert. activation: a name in `ACTIVATIONS`, of the gate, which is multiplied by up; or a
    function of both. bias: the experts have biases. shared: a dense block for every token beside the experts;
    shared_gate: its output is multiplied by the sigmoid of a learned product of x.
    """

    router: RouterSpec
    feed_forward: int
    activation: str | ClampedSwiGLU = "silu"
    bias: bool = False
    shared: MLPSpec | None = None
    shared_gate: bool = False

    def make(self, build: Build, embed: int) -> MoE:
        """The module: x [T, E] -> [T, E]."""
        return MoE(build, embed, self)


def route(
    logits: Float[Array, "T X"], spec: RouterSpec, correction: Float[Array, "X"] | None = None
) -> tuple[Float[Array, "T C"], Int[Array, "T C"]]:
    """(weights, experts) that each token takes, from float32 logits. Of equal scores the lower expert is better."""
    if spec.score == "softmax_of_chosen":
        chosen, experts = lax.top_k(logits, spec.top_k)
        return jax.nn.softmax(chosen, axis=-1) * spec.scale, experts.astype(jnp.int32)
    scores = jax.nn.softmax(logits, axis=-1) if spec.score == "softmax" else jax.nn.sigmoid(logits)
    choice = scores if correction is None else scores + correction
    if spec.top_groups < spec.num_groups:
        choice = jnp.where(_in_best_groups(choice, spec), choice, -jnp.inf)
    _, experts = lax.top_k(choice, spec.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights * spec.scale, experts.astype(jnp.int32)


def _in_best_groups(choice: Float[Array, "T X"], spec: RouterSpec) -> Array:
    grouped = choice.reshape(choice.shape[0], spec.num_groups, -1)
    worth = jnp.sum(lax.top_k(grouped, 2 if spec.group_score == "top2" else 1)[0], axis=-1)
    best = lax.top_k(worth, spec.top_groups)[1]
    is_best = jnp.any(best[:, :, None] == jnp.arange(spec.num_groups), axis=1)
    return jnp.repeat(is_best, grouped.shape[2], axis=1)


class Experts(nnx.Module):
    """The experts' weights, outputs before inputs: gate_up [X, 2, F, E], down [X, E, F], and their biases.

    Whole experts are sharded over the mesh's `expert` axis, and a part of each expert's F goes to each device of the
    `tensor` axis; with `Build.experts_over_tensor` whole experts are sharded over that axis too.
    """

    def __init__(self, build: Build, embed: int, spec: MoESpec) -> None:
        count, width = spec.router.num_experts, spec.feed_forward
        experts, inner = ("experts", "feed_forward")
        if build.experts_over_tensor:
            experts, inner = ("experts_over_tensor", None)
        axes = (experts, None, inner, "embed")
        self.gate_up = parameter(build, (count, 2, width, embed), axes, in_place=True)
        self.down = parameter(build, (count, embed, width), (experts, "embed", inner), in_place=True)
        self.gate_up_bias = parameter(build, (count, 2, width), (experts, None, inner)) if spec.bias else None
        self.down_bias = parameter(build, (count, embed), (experts, "embed")) if spec.bias else None
        self.spec, self.build = spec, build
        mesh = abstract_mesh(tensor=build.tensor_parallel, expert=build.expert_parallel)
        # An axis that does not divide its dimension leaves it whole everywhere, as it does when weights are loaded.
        where = partition_spec((experts, None, inner, None), (count, 2, width, embed), mesh)
        self.mesh = mesh
        self.expert_axis, self.inner_axis = (
            axis if axis is not None and mesh.shape[axis] > 1 else None for axis in (where[0], where[2])
        )

    def __call__(
        self,
        x: Float[Array, "T E"],
        weights: Float[Array, "T C"],
        experts: Int[Array, "T C"],
        live: Int[Array, ""] | None = None,
    ) -> Float[Array, "T E"]:
        """The weighted sum of each token's experts. live: tokens from it on are padding, and cost next to nothing."""
        real = jnp.arange(x.shape[0]) < (x.shape[0] if live is None else live)
        gate_up, down = in_stack(self.gate_up), in_stack(self.down)
        biases = [None if p is None else p[...] for p in (self.gate_up_bias, self.down_bias)]
        held = [gate_up.array, biases[0], down.array, biases[1]]
        if self.mesh.size == 1 and self.build.platform != "tpu":
            return self._local(x, weights, experts, real, gate_up.index, held)
        # A kernel for TPU is compiled under shard_map even for one device: there it learns which TPU it is for.
        part, inner = self.expert_axis, self.inner_axis
        specs = [
            P(None, part, None, inner, None),
            P(part, None, inner),
            P(None, part, None, inner),
            P(part, None),
        ]
        held_specs = [None if array is None else spec for array, spec in zip(held, specs, strict=True)]
        call = jax.shard_map(
            self._local,
            mesh=self.mesh,
            in_specs=(P(), P(), P(), P(), P(), held_specs),
            out_specs=P(),
            check_vma=False,
        )
        return call(x, weights, experts, real, gate_up.index, held)

    def _local(
        self, x: Array, weights: Array, experts: Array, real: Array, layer: Array, held: list[Any]
    ) -> Array:
        """One device's share of the sum, and the sum over devices."""
        gate_up, gate_up_bias, down, down_bias = held
        num_tokens, chosen = experts.shape
        depth, count, _, width, embed = gate_up.shape
        if self.expert_axis is not None:
            experts = experts - lax.axis_index(self.expert_axis) * count
        mine = (experts >= 0) & (experts < count) & real[:, None]
        # Pairs of other devices and of padded tokens sort behind all others, into no group.
        key = jnp.where(mine, experts, count).reshape(-1)
        row = jnp.arange(key.size, dtype=jnp.int32)
        sorted_key, order = lax.sort((key, row), num_keys=1, is_stable=True)
        sizes = jnp.sum(key[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
        expert = jnp.minimum(sorted_key, count - 1)

        product = partial(grouped_matmul, group_sizes=sizes, layer=layer, platform=self.build.platform)
        both = product(x[order // chosen], gate_up.reshape(depth, count, 2 * width, embed))
        both = both.reshape(-1, 2, width)
        if gate_up_bias is not None:
            both = both + gate_up_bias[expert]
        y = product(self._activate(both[:, 0], both[:, 1]), down)
        if down_bias is not None:
            # Where devices share an expert, its bias is added by one of them.
            first = self.inner_axis is None or lax.axis_index(self.inner_axis) == 0
            y = y + jnp.where(first, down_bias[expert], jnp.zeros((), y.dtype))

        place = jnp.zeros_like(order).at[order].set(row, unique_indices=True)
        y = y[place].reshape(num_tokens, chosen, embed)
        # Rows of no group may hold anything, NaN too, and so may padded tokens: neither may meet the other, even as 0.
        parts = jnp.where(mine[:, :, None], y.astype(jnp.float32), 0.0)
        total = jnp.sum(parts * jnp.where(mine, weights, 0.0)[:, :, None], axis=1).astype(x.dtype)
        axes = tuple(axis for axis in (self.expert_axis, self.inner_axis) if axis is not None)
        return lax.psum(total, axes) if axes else total

    def _activate(self, gate: Array, up: Array) -> Array:
        activation = self.spec.activation
        return ACTIVATIONS[activation](gate) * up if isinstance(activation, str) else activation(gate, up)


def in_stack(param: nnx.Param) -> InStack:
    """The parameter's place in a stack of layers, which is of this layer alone where none is scanned over."""
    value: Any = param.get_value()
    return value if isinstance(value, InStack) else InStack(value[None], jnp.int32(0))


class MoE(nnx.Module):
    """Router, experts, and the shared block beside them where there is one."""

    def __init__(self, build: Build, embed: int, spec: MoESpec) -> None:
        count = spec.router.num_experts
        self.router = Linear(build, (count,), (embed,), (None,), ("embed",), bias=spec.router.bias)
        self.correction = parameter(build, (count,), (None,), jnp.float32) if spec.router.correction else None
        self.experts = Experts(build, embed, spec)
        self.shared = None if spec.shared is None else spec.shared.make(build, embed)
        self.shared_gate = Linear(build, (1,), (embed,), (None,), ("embed",)) if spec.shared_gate else None
        self.spec, self.weight_first = spec, build.weight_first

    def __call__(self, x: Float[Array, "T E"], live: Int[Array, ""] | None = None) -> Float[Array, "T E"]:
        correction = None if self.correction is None else self.correction[...]
        weights, experts = route(self.router_logits(x), self.spec.router, correction)
        y = self.experts(x, weights, experts, live)
        if self.shared is None:
            return y
        beside = self.shared(x)
        if self.shared_gate is not None:
            beside = beside * jax.nn.sigmoid(self.shared_gate(x))
        return y + beside

    def router_logits(self, x: Float[Array, "T E"]) -> Float[Array, "T X"]:
        """float32: two experts that bfloat16 could not tell apart would be chosen at random."""
        logits = project(self.router.weight[...], x, weight_first=self.weight_first, accumulate=jnp.float32)
        return logits if self.router.bias is None else logits + self.router.bias[...].astype(jnp.float32)
