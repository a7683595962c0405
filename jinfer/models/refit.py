"""Remakes saved parameters whose shape depends on the number of devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jinfer.errors import ModelError


def refit_kv_heads(
    path: str, saved: tuple[int, ...], wanted: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray] | None:
    """For one layer's fused qkv [K, G + 2, D, ...]: the same heads in groups of another number K of KV heads.

    K exceeds the model's own number where there are more devices than KV heads: each is then there once per
    device. Returns None for any other parameter, and for shapes that do not hold the same query heads.
    """
    if not path.rpartition(".")[0].endswith("attention.qkv") or len(saved) != len(wanted) or len(saved) < 3:
        return None
    (old, old_slots, *rest), (new, new_slots, *wanted_rest) = saved, wanted
    same_heads = rest == wanted_rest and old * (old_slots - 2) == new * (new_slots - 2) > 0
    if not same_heads or max(old, new) % min(old, new):
        return None

    def refit(fused: np.ndarray) -> np.ndarray:
        result = np.empty(wanted, fused.dtype)
        result[:, :-2] = fused[:, :-2].reshape(new, new_slots - 2, *rest)
        if new > old:
            result[:, -2:] = np.repeat(fused[:, -2:], new // old, axis=0)
            return result
        copies = fused[:, -2:].reshape(new, old // new, 2, *rest)
        if not (copies == copies[:, :1]).all():
            raise ModelError(f"{path} holds {old} different KV heads, and config.json asks for fewer: {new}")
        result[:, -2:] = copies[:, 0]
        return result

    return refit
