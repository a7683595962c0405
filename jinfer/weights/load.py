"""From a checkpoint to sharded arrays on the devices, leaf by leaf.

Host memory: besides the arrays themselves (which on CPU are host memory too) there is never more than the
shards of one leaf in the target dtype, what `build` returns for one leaf or one layer of it, and the
checkpoint tensors it is made of. On CPU the shards become the arrays without a copy.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from jinfer.errors import ModelError
from jinfer.weights.files import some
from jinfer.weights.source import TensorSource

# Transfers to an accelerator run behind the reading of the next leaf; more than this is not left waiting.
IN_FLIGHT_BYTES = 512 * 1024 * 1024

# XLA's CPU backend takes a host buffer as it is, without a copy, if it is aligned so.
ALIGNMENT = 64

# Among so many names of at most this length the closest to a missing one is looked for.
HINT_NAMES, HINT_LENGTH = 500, 200

Index = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Leaf:
    """One parameter as it will live on the devices, and how it is made from the checkpoint.

    `sources` are the checkpoint tensors and the shapes they must have; `build` gets them as host arrays in
    that order and returns the leaf in any dtype (a view is best: the cast is done by the loader).

    With `layers > 0` the first axis of `shape` stacks that many layers: `sources` then lists the tensors of
    layer 0, those of layer 1 and so on, and `build` is called once per layer with that layer's tensors and
    returns `shape[1:]`. A stack is thereby filled without ever being built twice.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    build: Callable[[list[np.ndarray]], np.ndarray]
    sharding: jax.sharding.Sharding | None = None
    layers: int = 0

    def __post_init__(self) -> None:
        if self.layers and (self.shape[:1] != (self.layers,) or len(self.sources) % self.layers):
            raise ValueError(
                f"leaf {self.path} stacks {self.layers} layers, "
                f"and has shape {self.shape} and {len(self.sources)} sources"
            )


def load_leaves(
    leaves: Iterable[Leaf],
    source: TensorSource,
    *,
    ignored: Callable[[str], bool] = lambda name: False,
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Loads every leaf into an array of its shape, dtype and sharding; returns them by path.

    Names for which `ignored` is true may be in the checkpoint without being used. Each device gets only its
    slices, and slices that no local device holds are not read.

    Raises:
      ModelError: a tensor is missing, unused or misshaped (found before anything is loaded), or has
        values that the leaf's dtype cannot hold.
    """
    planned = list(leaves)
    check_leaves(planned, source, ignored)
    arrays: dict[str, jax.Array] = {}
    in_flight: deque[jax.Array] = deque()
    for leaf in tqdm(planned, desc="loading weights", unit="array", disable=not progress):
        arrays[leaf.path] = array = _load(leaf, source)
        in_flight.append(array)
        while len(in_flight) > 1 and sum(a.nbytes for a in in_flight) > IN_FLIGHT_BYTES:
            in_flight.popleft().block_until_ready()
    for array in in_flight:
        array.block_until_ready()
    return arrays


def check_leaves(
    leaves: Sequence[Leaf], source: TensorSource, ignored: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises ModelError naming the tensors that are missing, misshaped, or present and used by no leaf."""
    paths = {leaf.path for leaf in leaves}
    if len(paths) != len(leaves):
        raise ValueError("two leaves have the same path")
    wanted = {name: shape for leaf in leaves for name, shape in leaf.sources}
    present = set(source.names())
    unused = sorted(name for name in present - wanted.keys() if not ignored(name))
    missing = [name for name in wanted if name not in present]
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensor(s): {some(missing)}{_hint(missing[0], unused)}: "
            "config.json asks for them, check that it belongs to these weights"
        )
    wrong = [
        f"{name} has shape {source.shape(name)}, expected {shape}"
        for name, shape in wanted.items()
        if source.shape(name) != tuple(shape)
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensor(s) of the checkpoint do not fit config.json: {some(wrong)}: "
            "check its sizes and head counts"
        )
    if unused:
        raise ModelError(
            f"the checkpoint has {len(unused)} tensor(s) that this model does not use: {some(unused)}: "
            "config.json describes a smaller or a different model"
        )


def _hint(missing: str, unused: Sequence[str]) -> str:
    """The unused name that is closest to a missing one; comparing takes the square of a name's length, so among few."""
    short = [name for name in unused if len(name) <= HINT_LENGTH]
    if len(short) > HINT_NAMES:
        last = missing.rpartition(".")[2]
        short = [name for name in short if name.endswith(last)][:HINT_NAMES]
    close = difflib.get_close_matches(missing[:HINT_LENGTH], short, n=1, cutoff=0.6)
    return f"; the checkpoint has {close[0]}" if close else ""


def _load(leaf: Leaf, source: TensorSource) -> jax.Array:
    dtype = np.dtype(leaf.dtype)
    if leaf.sharding is None:
        whole = tuple((0, size) for size in leaf.shape)
        buffers = {whole: _empty(leaf.shape, dtype)}
        _fill(leaf, source, buffers)
        return jax.device_put(buffers[whole])
    held = {
        device: _bounds(index or (), leaf.shape)
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items()
    }
    # Devices that hold the same slice share one host buffer.
    buffers = {index: _empty([stop - start for start, stop in index], dtype) for index in held.values()}
    _fill(leaf, source, buffers)
    shards = jax.device_put([buffers[index] for index in held.values()], list(held))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _fill(leaf: Leaf, source: TensorSource, buffers: dict[Index, np.ndarray]) -> None:
    """Writes the leaf's values into the buffers of its slices."""
    if not leaf.layers:
        built = _build(leaf, leaf.sources, leaf.shape, source)
        for index, buffer in buffers.items():
            _cast(built[tuple(slice(*bounds) for bounds in index)], buffer, leaf)
        _release(leaf.sources, source)
        return
    each = len(leaf.sources) // leaf.layers
    for layer in range(leaf.layers):
        holders = [(i, b) for i, b in buffers.items() if i[0][0] <= layer < i[0][1]]
        if not holders:
            continue
        sources = leaf.sources[layer * each : (layer + 1) * each]
        built = _build(leaf, sources, leaf.shape[1:], source)
        for index, buffer in holders:
            _cast(
                built[tuple(slice(*bounds) for bounds in index[1:])],
                buffer[layer - index[0][0], ...],
                leaf,
            )
        del built
        _release(sources, source)


def _build(
    leaf: Leaf, sources: Iterable[tuple[str, Any]], shape: tuple[int, ...], source: TensorSource
) -> np.ndarray:
    built = leaf.build([source.read(name) for name, _ in sources])
    if built.shape != tuple(shape):
        raise ValueError(f"build of leaf {leaf.path} returned shape {built.shape}, expected {tuple(shape)}")
    return built


def _release(sources: Iterable[tuple[str, Any]], source: TensorSource) -> None:
    for name, _ in sources:
        source.release(name)


def _cast(values: np.ndarray, into: np.ndarray, leaf: Leaf) -> None:
    """Writes `values` into `into`, converting; numpy works in small blocks, so no second copy is made."""
    if values.dtype == ml_dtypes.bfloat16 and into.dtype == np.float32 and into.flags.c_contiguous:
        # bfloat16 is the upper half of float32: shifting is exact and about twice as fast as converting.
        bits = into.view(np.uint32)
        np.copyto(bits, values.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
        return
    _check_cast(values.dtype, into.dtype, leaf)
    with np.errstate(over="ignore"):
        np.copyto(into, values, casting="unsafe")
    if into.dtype == np.float16 and values.dtype != np.float16 and not np.isfinite(into).all():
        if all(np.isfinite(block).all() for block in _rows(values)):
            raise ModelError(
                f"{some(name for name, _ in leaf.sources)}: has values beyond float16's range: "
                "use --dtype bfloat16 or float32"
            )


def _rows(values: np.ndarray) -> Iterator[np.ndarray]:
    return iter(values) if values.ndim else iter([values])


def _check_cast(found: np.dtype, wanted: np.dtype, leaf: Leaf) -> None:
    if found == wanted or not jnp.issubdtype(wanted, jnp.floating):
        return
    if not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise ModelError(
            f"{some(name for name, _ in leaf.sources)}: has dtype {found}, expected a float of at least "
            "16 bits: quantized weights cannot be read as plain ones"
        )


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of uninitialized values, aligned so that XLA's CPU backend can take it without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
