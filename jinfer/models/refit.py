"""Remakes saved parameters whose shape depends on the number of devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jinfer.errors import ModelError


def refit_kv_heads(
    path: str, saved: tuple[int, ...], wanted: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray] | None:
    """For one layer's fused qkv [K, G + 2, D, ...] or norm of all keys [K, D]: the same heads, another number K.

    K exceeds the model's own number of KV heads where there are more devices than those: each is then there once per
    device. Returns None for any other parameter, and for shapes that do not hold the same heads.
    """
    block = path.rpartition(".")[0]
    if block.endswith("attention.k_norm") and len(saved) == len(wanted) == 2 and saved[1] == wanted[1]:
        fits = max(saved[0], wanted[0]) % min(saved[0], wanted[0]) == 0
        return (lambda norms: _regroup(path, norms, wanted[0])) if fits else None
    if not block.endswith("attention.qkv") or len(saved) != len(wanted) or len(saved) < 3:
        return None
    (old, old_slots, *rest), (new, new_slots, *wanted_rest) = saved, wanted
    same_heads = rest == wanted_rest and old * (old_slots - 2) == new * (new_slots - 2) > 0
    if not same_heads or max(old, new) % min(old, new):
        return None

    def refit(fused: np.ndarray) -> np.ndarray:
        result = np.empty(wanted, fused.dtype)
        result[:, :-2] = fused[:, :-2].reshape(new, new_slots - 2, *rest)
        result[:, -2:] = _regroup(path, fused[:, -2:], new)
        return result

    return refit


def _regroup(path: str, heads: np.ndarray, new: int) -> np.ndarray:
    """[K, ...] as [new, ...]: each KV head several times, or the copies of each as one."""
    old, *rest = heads.shape
    if new > old:
        return np.repeat(heads, new // old, axis=0)
    copies = heads.reshape(new, old // new, *rest)
    if not (copies == copies[:, :1]).all():
        raise ModelError(f"{path} holds {old} different KV heads, and config.json asks for fewer: {new}")
    return copies[:, 0]
