"""TPUs that libtpu compiles for without their being there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TPUTarget:
    """One generation. Figures are per TensorCore: what one instance of a kernel has for itself.

    Attributes:
      topology: the smallest one libtpu describes (a whole host); a mesh over one of its devices is fine.
      clock_hz: of the core: peak bf16 rate over the multiply-adds its matrix units hold.
      bytes_per_second: HBM bandwidth, shared out evenly where cores share a chip.
      flops_per_second: dense bf16.
      mxu_size, mxus: rows and columns of one matrix unit, and how many there are.
      max_devices: in `topology`.
    """

    name: str
    topology: str
    accelerator: str
    clock_hz: float
    bytes_per_second: float
    flops_per_second: float
    mxu_size: int
    mxus: int
    max_devices: int

    kind = "tpu"

    @property
    def bytes_per_cycle(self) -> float:
        return self.bytes_per_second / self.clock_hz

    @property
    def flops_per_cycle(self) -> float:
        return self.flops_per_second / self.clock_hz

    def missing(self) -> str | None:
        """Why nothing can be compiled here, or None."""
        if importlib.util.find_spec("libtpu") is None:
            return "libtpu is not installed (pip install 'jax[tpu]', Linux on x86-64)"
        return None

    def environment(self, dump: Path | None = None) -> dict[str, str]:
        """What libtpu wants to know of a machine that it is not on. It must be set before jax is imported."""
        variables = {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": self.accelerator,
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nothing here touches a chip, so nothing needs the lock on it
        }
        if dump is not None:
            flags = (f"--xla_jf_dump_to={dump}", "--xla_jf_dump_hlo_text=true", "--xla_jf_dump_llo_text=true")
            variables["LIBTPU_INIT_ARGS"] = " ".join(flags)
        return variables

    def devices(self) -> list[Any]:
        """The described devices. Only in a process with `environment()`."""
        from jax.experimental import topologies

        return list(topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices)


TPU_TARGETS = (
    TPUTarget("v5e", "v5e:2x2", "v5litepod-4", 1.5e9, 0.82e12, 197e12, 128, 4, 4),
    # Two cores share a chip and its memory.
    TPUTarget("v5p", "v5p:2x2x1", "v5p-8", 1.75e9, 2.765e12 / 2, 459e12 / 2, 128, 4, 4),
    TPUTarget("v6e", "v6e:2x2", "v6e-4", 1.75e9, 1.64e12, 918e12, 256, 2, 4),
    # Two cores share a chip, and each is a device of its own.
    TPUTarget("tpu7x", "tpu7x:2x2x1", "tpu7x-8", 2.2e9, 7.38e12 / 2, 2307e12 / 2, 256, 2, 8),
)
