"""The loop over layers: scanned over stacked weights, or unrolled over separate ones.

On TPU a scan costs no copy and makes compile time independent of depth. On GPU and CPU a scan copies every layer's
weights every step, so there the layers stay apart. One body serves both.

Layers are distinguished by their specs. Unlike layers usually repeat a pattern (five with a window, one without), and a
few break it; a scan runs over each run of repetitions, and what repeats nothing stands alone:

    specs      D  W W F  W W F  W W F  W        segments  D | (W W F) x 3 | W
    scanned    .  1 2 3  4 5 6  7 8 9  .        weights   layers.0 | layer.1_3, layer.2_3, layer.3_3 | layers.10
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jinfer.layers.attention import KVKind, LayerIndex
from jinfer.layers.parameter import Build, InStack

Carry = TypeVar("Carry")
Spec = TypeVar("Spec", bound=Hashable)


@dataclass(frozen=True)
class Segment:
    """Layers first, ..., first + period * repeats - 1: a pattern of `period` layers, `repeats` times."""

    first: int
    period: int
    repeats: int


def segments_of(specs: Sequence[Hashable]) -> list[Segment]:
    """Parts of the layers, in order, such that as few different layer programs as possible run them all."""
    count = len(specs)
    cheapest: list[tuple[int, list[Segment]]] = [(0, [])] * (count + 1)
    for first in reversed(range(count)):
        cost, rest = cheapest[first + 1]
        best = (cost + 1, [Segment(first, 1, 1), *rest])
        for period in range(1, (count - first) // 2 + 1):
            end = first + period
            while end < count and specs[end] == specs[end - period]:
                end += 1
            repeats = (end - first) // period
            if repeats > 1:
                cost, rest = cheapest[first + period * repeats]
                # At the same cost a repetition goes before a layer that stands alone.
                if (cost + period, best[1][0].repeats) < (best[0], 2):
                    best = (cost + period, [Segment(first, period, repeats), *rest])
        cheapest[first] = best
    return cheapest[0][1]


# Parameter paths inside a stack: of layer 3, and of layers 1, 4, 7, ... in a leading dimension.
ALONE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.*)")  # layers.3.mlp.down.weight
STACKED = re.compile(r"(?:.*\.)?layer\.(\d+)_(\d+)\.(.*)")  # layer.1_3.mlp.down.weight


def is_stacked(path: str) -> bool:
    """True if the parameter's leading dimension is layers."""
    return STACKED.fullmatch(path) is not None


def layers_of(path: str, shape: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """(the layers whose parameter this is, its path inside a layer); ((), path) for one outside of layers."""
    if found := ALONE.fullmatch(path):
        return (int(found[1]),), found[2]
    if found := STACKED.fullmatch(path):
        first, step = int(found[1]), int(found[2])
        return tuple(range(first, first + step * shape[0], step)), found[3]
    return (), path


class LayerStack(nnx.Module):
    """One layer per spec, made by `make(build, spec)`.

    `layers[i]` is layer i, standing alone; `layer["f_s"]` holds layers f, f + s, f + 2 s, ... in a leading dimension
    of its parameters. kinds: what each layer keeps per token, see `LayerIndex`.
    """

    def __init__(
        self,
        build: Build,
        specs: Sequence[Spec],
        make: Callable[[Build, Spec], nnx.Module],
        *,
        kinds: Sequence[KVKind],
        scan: bool,
    ) -> None:
        self.specs, self.kinds = tuple(specs), tuple(kinds)
        self.segments = (
            tuple(segments_of(specs)) if scan else tuple(Segment(i, 1, 1) for i in range(len(specs)))
        )
        alone, stacked = {}, {}
        for s in self.segments:
            for at in range(s.first, s.first + s.period):
                if s.repeats == 1:
                    alone[str(at)] = make(build, specs[at])
                else:
                    stacked[f"{at}_{s.period}"] = make(replace(build, stack=s.repeats), specs[at])
        self.layers, self.layer = nnx.Dict(alone), nnx.Dict(stacked)

    def __call__(self, body: Callable[[Any, LayerIndex, Carry], Carry], carry: Carry) -> Carry:
        """Runs `carry = body(layer, index, carry)` for every layer in order."""
        calls: dict[Hashable, Callable[..., Any]] = {}
        for s in self.segments:
            if s.repeats > 1:
                carry = self._scan(s, body, carry)
            else:
                carry = self._alone(s.first, body, carry, calls)
        return carry

    def _index(self, layers: Sequence[int] | int) -> LayerIndex:
        """Of one layer, or of several in one array each."""
        in_kind = [self.kinds[:i].count(kind) for i, kind in enumerate(self.kinds)]
        return LayerIndex(jnp.asarray(layers, jnp.int32), jnp.asarray(np.take(in_kind, layers), jnp.int32))

    def _scan(self, s: Segment, body: Callable[[Any, LayerIndex, Carry], Carry], carry: Carry) -> Carry:
        places = range(s.first, s.first + s.period)
        split = [nnx.split(self.layer[f"{at}_{s.period}"]) for at in places]
        params = [dict(nnx.to_flat_state(state)) for _, state in split]
        # What a kernel reads in place is not sliced by the scan, but goes to every layer whole.
        sliced = [{path: p for path, p in of.items() if not p.get_metadata()["in_place"]} for of in params]
        indices = [self._index([at + s.period * r for r in range(s.repeats)]) for at in places]

        def step(carry: Carry, xs: Any) -> tuple[Carry, None]:
            repeat, slices, here = xs
            for (graph, _), of, own, index in zip(split, params, slices, here, strict=True):
                whole = {path: p.replace(InStack(p.get_value(), repeat)) for path, p in of.items()}
                flat = [(path, own.get(path, p)) for path, p in whole.items()]
                carry = body(nnx.merge(graph, nnx.from_flat_state(flat)), index, carry)
            return carry, None

        repeats = jnp.arange(s.repeats, dtype=jnp.int32)
        return lax.scan(step, carry, (repeats, sliced, indices))[0]

    def _alone(
        self,
        at: int,
        body: Callable[[Any, LayerIndex, Carry], Carry],
        carry: Carry,
        calls: dict[Hashable, Callable[..., Any]],
    ) -> Carry:
        graph, weights = nnx.split(self.layers[str(at)])
        # Equal layers are traced and lowered once: the jitted body is a function that the step calls several times.
        if self.specs[at] not in calls:

            @jax.jit
            def call(weights: Any, index: LayerIndex, carry: Carry) -> Carry:
                return body(nnx.merge(graph, weights), index, carry)

            calls[self.specs[at]] = call
        return calls[self.specs[at]](weights, self._index(at), carry)
