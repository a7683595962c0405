"""New weights for a running engine: what is given is checked as a whole before the first array moves."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jinfer.errors import ModelError
from jinfer.models.decoder import Params

Targets = Mapping[str, jax.ShapeDtypeStruct]


def check_update(params: Params | Mapping[str, Any], wanted: Targets) -> dict[str, Any]:
    """The given arrays by path, jax's as they are and others as numpy's, in the order of `wanted`.

    Raises:
      ModelError: a parameter is missing, unknown, misshaped, no array of real numbers, or has values that are not
        finite in the dtype that the engine keeps it in.
    """
    given = params.arrays if isinstance(params, Params) else params
    if not isinstance(given, Mapping):
        raise ModelError(
            f"update_weights: a {type(given).__name__} was given, expected Params or a mapping of arrays by path"
        )
    if set(given) != set(wanted):
        missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted), key=str)
        raise ModelError(f"update_weights: missing {missing[:5]}, unknown {extra[:5]}: give the same tree")
    arrays = {path: _as_array(path, given[path]) for path in wanted}
    for path, target in wanted.items():
        if tuple(arrays[path].shape) != tuple(target.shape):
            raise ModelError(
                f"update_weights: {path} has shape {tuple(arrays[path].shape)}, expected {tuple(target.shape)}"
            )
        if not jnp.issubdtype(arrays[path].dtype, jnp.floating):
            raise ModelError(
                f"update_weights: {path} has dtype {arrays[path].dtype}, expected a floating one such as {target.dtype}"
            )
    for path, target in wanted.items():
        if not _is_finite(arrays[path], target.dtype):
            raise ModelError(
                f"update_weights: {path} has values that are not finite as {target.dtype} (NaN or infinity): nothing is "
                "changed; look for a training step that diverged"
            )
    return arrays


def place(array: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A checked array in the target's dtype and sharding, there when this returns; always a copy, since a training step
    that donates its parameters would take the engine's with them."""
    if isinstance(array, jax.Array):
        new = jax.device_put(array.astype(target.dtype), target.sharding, may_alias=False)
    else:
        # On CPU jax may keep the very memory of a host array, whatever `may_alias` says.
        new = jax.device_put(_host_cast(array, target.dtype, copy=True), target.sharding)
    return jax.block_until_ready(new)


def _as_array(path: str, value: Any) -> Any:
    if isinstance(value, Tracer):
        raise ModelError(f"update_weights: {path} is being traced: call it outside of jit, grad and vmap")
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise ModelError(
                f"update_weights: {path} was deleted or donated: give arrays that are still there"
            )
        return value
    try:
        return np.asarray(value)
    except Exception as error:
        raise ModelError(f"update_weights: {path} is a {type(value).__name__}, expected an array") from error


def _host_cast(array: np.ndarray, dtype: Any, *, copy: bool = False) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is found not to be finite
        return array.astype(dtype, copy=copy)


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(array: jax.Array, dtype: Any) -> jax.Array:
    return jnp.isfinite(array.astype(dtype)).all()


def _is_finite(array: Any, dtype: Any) -> bool:
    if isinstance(array, jax.Array):
        return bool(_all_finite(array, jnp.dtype(dtype)))
    return bool(np.isfinite(_host_cast(array, dtype)).all())
