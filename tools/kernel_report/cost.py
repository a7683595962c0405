"""From a kernel's bundles to what a block of keys and values costs."""

from __future__ import annotations

from dataclasses import dataclass

from tools.kernel_cases import Case, pairs_per_pass
from tools.kernel_report.bundles import (
    GRANULE_BYTES,
    Region,
    Utilization,
    fetches_ahead,
    hot_loop,
    steady_pass,
)
from tools.targets import TPUTarget

SPILLS = ("VLOAD:FILL", "VSTORE:SPILL")


@dataclass(frozen=True)
class Cost:
    """One kernel's hot loop.

    Attributes:
      bundles: issued per pass (see `steady_pass`): cycles, with every wait left out. Inner loops are passed once.
      all_bundles: with every branch taken.
      tokens: KV tokens that a pass of paged attention fetches; None where the text does not tell.
      fetched_bytes: copied from HBM per pass.
      fetch_cycles: what that takes at the chip's bandwidth.
      pairs: products of a query head with a key; where a case does not tell, as many as the matrix instructions
        have room for.
      mxu_share: of the matrix units' time that streaming those operands takes at peak rate, 0 to 1.
      units: share of the slots of every other unit.
      in_flight: the next block is asked for before this one is waited for; None where no loop fetches.
      spills: refills and spills per bundle.
    """

    bundles: int
    all_bundles: int
    tokens: int | None
    fetched_bytes: int
    fetch_cycles: float
    pairs: int
    mxu_share: float
    units: dict[str, float]
    spills: float
    in_flight: bool | None

    @property
    def over_fetch(self) -> float | None:
        """Compute time over fetch time: below 1 the kernel is memory-bound."""
        return self.bundles / self.fetch_cycles if self.fetch_cycles else None

    def per_tokens(self, tokens: int) -> float | None:
        """Bundles for that many KV tokens of one row."""
        return self.bundles * tokens / self.tokens if self.tokens else None

    def per_pairs(self, pairs: int) -> float | None:
        """Bundles for that many (query head, key) pairs."""
        return self.bundles * pairs / self.pairs if self.pairs else None


def cost_of(root: Region, utilization: Utilization, case: Case, target: TPUTarget) -> Cost:
    hot = hot_loop(root)
    parts = steady_pass(hot)

    def total(count: str) -> int:
        return sum(getattr(region, count) for region in parts)

    fetched = total("fetched_granules") * GRANULE_BYTES
    bundles, rows = total("bundles"), total("matmul_rows")
    used = {unit: sum(region.units.get(unit, 0) for region in parts) for unit in utilization.capacity}
    # A row streams once through a tile for q k^T and once for p v; each tile is mxu_size keys wide and as many
    # numbers of the head deep.
    widths = (case.heads.head_dim, case.heads.value_dim or case.heads.head_dim)
    passes = sum(-(-width // target.mxu_size) for width in widths)
    rows_per_cycle = target.flops_per_cycle / (2 * target.mxu_size**2)
    return Cost(
        bundles=bundles,
        all_bundles=hot.total("bundles"),
        tokens=round(fetched / bytes_per_token(case)) or None if case.op == "paged_attention" else None,
        fetched_bytes=fetched,
        fetch_cycles=fetched / target.bytes_per_cycle,
        pairs=pairs_per_pass(case) or rows * target.mxu_size // passes,
        mxu_share=rows / rows_per_cycle / bundles,
        units={
            unit: used[unit] / (slots * bundles)
            for unit, slots in utilization.capacity.items()
            if unit not in SPILLS
        },
        spills=sum(used.get(unit, 0) for unit in SPILLS) / bundles,
        in_flight=fetches_ahead(root, hot),
    )


def bytes_per_token(case: Case) -> int:
    """Of the keys and values of one position, with the head size as the chip pads it."""
    width = -(-case.heads.head_dim // 128) * 128
    kept = 1 if case.heads.shared_values else 2
    return kept * case.heads.kv_heads * width * {"float32": 4, "bfloat16": 2}.get(case.kv_dtype, 1)
