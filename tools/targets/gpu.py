"""NVIDIA GPUs that XLA and Mosaic compile for without their being there."""

from __future__ import annotations

import importlib.util
import os
import site
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Everything that compiling without a device takes; the first is the PJRT plugin itself.
PACKAGES = {
    "jax_plugins.xla_cuda13": "jax-cuda13-plugin and jax-cuda13-pjrt",
    "nvidia.cu13": "nvidia-cuda-nvcc, nvidia-cuda-nvrtc and nvidia-nvjitlink",
}

PROTO = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth:d}
l2_cache_size: {l2_bytes} clock_rate_ghz: {clock_ghz} device_memory_size: {memory_bytes}
shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: {major} minor: {minor} }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }} runtime_version {{ major: 13 }}
device_description_str: "{description}" """


@dataclass(frozen=True)
class GPUTarget:
    """One device. Bandwidth and rate are the vendor's figures, bf16 without sparsity."""

    name: str
    major: int
    minor: int
    cores: int
    clock_ghz: float
    bytes_per_second: float
    flops_per_second: float
    l2_bytes: int
    memory_bytes: int
    max_devices: int = 1

    kind = "gpu"

    @property
    def proto(self) -> str:
        """The description that XLA's GPU compiler takes in place of a device."""
        return PROTO.format(
            cores=self.cores,
            bandwidth=int(self.bytes_per_second),
            l2_bytes=self.l2_bytes,
            clock_ghz=self.clock_ghz,
            memory_bytes=self.memory_bytes,
            major=self.major,
            minor=self.minor,
            description=f"NVIDIA {self.name}",
        )

    def missing(self) -> str | None:
        """Why nothing can be compiled here, or None."""
        absent = [packages for module, packages in PACKAGES.items() if not _found(module)]
        return f"not installed: {'; '.join(absent)}" if absent else None

    def environment(self, dump: Path | None = None) -> dict[str, str]:
        """Must be set before jax is imported."""
        variables = {"JAX_PLATFORMS": "cpu"}
        toolkit = cuda_root()
        if toolkit is not None:
            # ptxas for XLA, nvdisasm for the dumps.
            path = os.pathsep.join((str(toolkit / "bin"), os.environ.get("PATH", "")))
            variables |= {"CUDA_ROOT": str(toolkit), "PATH": path}
        if dump is not None:
            variables |= {
                "MOSAIC_GPU_DUMP_TO": str(dump),
                "MOSAIC_GPU_DUMP_PTXAS": "1",
                "MOSAIC_GPU_DUMP_SASS": "1",
                "MOSAIC_GPU_DUMP_PTX": "1",
            }
        return variables

    def devices(self) -> list[Any]:
        """The described devices. Only in a process with `environment()`."""
        from jax.experimental import topologies

        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=self.proto, topology="1x1x1"
        )
        return list(described.devices)


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there either
        return False


def cuda_root() -> Path | None:
    """Where the nvidia packages put ptxas and nvdisasm."""
    roots = {sysconfig.get_paths()["purelib"], *site.getsitepackages()}
    found = [Path(root) / "nvidia" / "cu13" for root in roots]
    return next((root for root in found if (root / "bin").is_dir()), None)


GPU_TARGETS = (
    GPUTarget("H100", 9, 0, 132, 1.98, 3.35e12, 989e12, 52428800, 85520809984),
    GPUTarget("H200", 9, 0, 132, 1.98, 4.8e12, 989e12, 62914560, 150121545728),
    GPUTarget("B200", 10, 0, 148, 1.965, 8e12, 2250e12, 132644864, 191514017792),
)
