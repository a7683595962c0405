"""What the Mosaic GPU kernels share: which device they are for, and the few operations that interpret mode lacks.

GPU interpret mode (jax 0.10.2) runs grids, warpgroups, TMA copies, barriers and shared memory, and finds races between
them. It has no register layouts, no iota, no wgmma with a transposed operand or with its left side in registers, and
no accumulator that starts from registers. Those are here, each with a plain meaning for interpret mode, so that the
kernels around them (every copy, barrier, index and branch) are the ones that are compiled. Not covered by interpret
mode: races of copies from shared to global memory, and the layouts themselves, which only compiling checks.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import current_platform

LOG2_E = 1.4426950408889634
NEGATIVE = -1e30  # stands for minus infinity where a difference of two of them must stay finite

WARPGROUP = 128  # threads
SMEM_BYTES = 227 * 1024  # of one block on Hopper
STREAMING_MULTIPROCESSORS = 132  # of an H100 or H200 with SXM; what a device says of itself goes first
TABLE = Path(__file__).with_name("gpu_table.json")
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


def interpreting() -> bool:
    """Whether kernels traced now are interpreted on the CPU (`force_gpu_interpret_mode`)."""
    from jax._src import config  # the mode has no public name in jax 0.10.2

    mode = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return mode is not None and mode.value is not None


def target_kind() -> str | None:
    """The name of the GPU that a computation traced now is for: of the abstract mesh's, else of the default device."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        return described.device_kind if described.platform in ("cuda", "gpu") else None
    if current_platform() != "gpu":
        return None
    return jax.devices()[0].device_kind


def why_not_here() -> str | None:
    """Why no wgmma kernel can run where a computation traced now is placed, or None."""
    if interpreting():
        return None
    kind = target_kind()
    if kind is None:
        return "it needs an NVIDIA GPU of the Hopper generation, and this computation is placed on none"
    if HOPPER.search(kind) is None:
        return f"its kernels use wgmma, which only the Hopper generation (H100, H200) has, and this is {kind}"
    return None


def num_blocks_at_once() -> int:
    """Streaming multiprocessors of the target: a persistent kernel starts as many blocks."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None and described.num_cores:
        return described.num_cores
    if described is None and current_platform() == "gpu":
        return getattr(jax.devices()[0], "core_count", None) or STREAMING_MULTIPROCESSORS
    return STREAMING_MULTIPROCESSORS


@functools.cache
def _table(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def measured(kernel: str, head_dim: int) -> dict[str, int]:
    """What the table has for this device: fields of the kernel's config that go before the heuristic's.

    The table is `{device name: {kernel: {head size: {field: value}}}}`; a device's name is jax's `device_kind`.
    """
    return _table(TABLE).get(target_kind() or "", {}).get(kernel, {}).get(str(head_dim), {})


def swizzle_for(head_dim: int) -> int:
    """Bytes of the widest swizzle whose tiles a row of bf16 fills: 128, 64 or 32."""
    return next(width for width in (128, 64, 32) if head_dim * 2 % width == 0)


def matrix(*shape: int, head_dim: int) -> Any:
    """bf16 shared memory whose last two axes are a matrix that TMA fills and wgmma reads."""
    swizzle = swizzle_for(head_dim)
    return plgpu.SMEM(
        shape,
        jnp.bfloat16,
        transforms=(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)),
    )


def in_rows(x: jax.Array) -> jax.Array:
    """A vector with one entry per row of an accumulator, laid out beside its rows."""
    return x if interpreting() else plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(1))


def in_accumulator(x: jax.Array) -> jax.Array:
    return x if interpreting() else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def in_vector(x: jax.Array) -> jax.Array:
    """float32 of 128 or 256 entries, spread over a warpgroup as a load from global memory spreads it."""
    if interpreting():
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED(x.shape, vec_size=x.size // WARPGROUP))


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """int32[shape], counting along an axis, in an accumulator's layout."""
    if interpreting():
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def row_iota(rows: int) -> jax.Array:
    """int32[rows], counting, laid out beside an accumulator's rows."""
    if interpreting():
        return lax.iota(jnp.int32, rows)
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])


def load_rows(reference: Any) -> jax.Array:
    """A vector from shared memory, laid out beside an accumulator's rows."""
    if interpreting():
        return reference[...]
    return plgpu.load(reference, (), layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def product_transposed(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
    """a b^T as float32[M, N], of a [M, D] and b [N, D] in shared memory; `meanwhile` runs while it is under way."""
    if interpreting():
        if meanwhile is not None:
            meanwhile()
        x, y = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
        return lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision="highest")

    def compute(accumulator):
        plgpu.wgmma(accumulator, a, plgpu.transpose_ref(b, (1, 0)))
        if meanwhile is not None:
            meanwhile()
        return accumulator[...]

    return pl.run_scoped(compute, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))


def accumulate(accumulator: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """accumulator + a b: bf16 a [M, N] in registers, b [N, D] in shared memory."""
    if interpreting():
        return accumulator + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32), precision="highest")

    def compute(reference):
        plgpu.wgmma(reference, a, b)

    return cast(jax.Array, pl.run_state(compute)(plgpu.WGMMAAccumulatorRef.init(accumulator)))


def clear_outside(values: Any, low: jax.Array, high: jax.Array) -> None:
    """Sets the rows of values [N, D] in shared memory outside [low, high) to zero.

    A slot where no token was written may hold anything, NaN too, and weight 0 times NaN is NaN.
    """
    rows, columns = values.shape
    width = swizzle_for(columns) // 2  # at once: more would not fit the registers beside a wide accumulator
    for column in range(0, columns, width):
        part = values.at[:, pl.ds(column, width)]
        row = iota((rows, width), 0)
        kept = jnp.where((row >= low) & (row < high), part[...], jnp.zeros((rows, width), values.dtype))
        plgpu.commit_smem()  # every thread has read before any writes
        part[...] = kept
    plgpu.commit_smem()


def softmax_step(
    logits: jax.Array, top: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One block of an online softmax in base 2: (bf16 weights, new top, new total, factor for what is summed so far).

    Args:
      logits: float32[M, N], in units of log2.
      top, total: float32[M].
    """
    new_top = jnp.maximum(top, jnp.max(logits, axis=1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(logits - along_rows(new_top, logits.shape))
    total = total * shrink + jnp.sum(weights, axis=1)
    return weights.astype(jnp.bfloat16), new_top, total, shrink


def capped(logits: jax.Array, scale: jax.Array, soft_cap: float | None) -> jax.Array:
    """Logits of softmax in units of log2: scaled, and capped when there is a cap.

    tanh is made from exp2: the chip's own approximation is off by 2**-11 of the cap. Of cap (1 - 2 / (e^2x + 1)) the
    leading cap is left out, for a softmax does not change when all its logits move; `sink_logits` moves along.
    """
    if soft_cap is None:
        return logits * (scale * LOG2_E)
    twice = jnp.exp2(logits * (scale * (2 * LOG2_E / soft_cap)))
    return (-2 * soft_cap * LOG2_E) / (twice + 1.0)  # right at the ends too, where e^2x is infinite or zero


def sink_logits(sinks: jax.Array, soft_cap: float | None) -> jax.Array:
    """Sinks in the units, and with the shift, of `capped`."""
    return (sinks.astype(jnp.float32) - (soft_cap or 0.0)) * LOG2_E
