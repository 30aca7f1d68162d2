"""What NVIDIA's data sheets and architecture whitepapers say about GPUs. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.errors import UserError

GB = 1e9


@dataclass(frozen=True)
class GpuSpec:
    """A GPU, by the names that the driver reports. Bytes per second are for one direction.

    The network is that of usual servers: NVIDIA's DGX and HGX, and 200 Gbit/s for eight GPUs with
    PCIe, of which no data sheet speaks.
    """

    name: str  # as `shardway plan --gpu` spells it
    pattern: str  # of the driver's names; other names, such as MIG slices, are other devices
    half: float  # dense TFLOP/s in bf16 and fp16 with fp32 accumulation
    single: float  # TFLOP/s in fp32, without TF32
    bandwidth: float  # GB/s of the memory
    link: float  # GB/s to another GPU of the machine: NVLink, or PCIe
    network: float  # GB/s to another machine, for each GPU
    memory: float  # GB; the driver reports a little more or less


# If a sheet lists TFLOP/s with sparsity, half of them.
GPUS = (
    GpuSpec("B200", r"B200", 2250.0, 75.0, 8000, 900, 50, 180),
    GpuSpec("H200", r"GH200 \w+|H200", 989.4, 66.9, 4800, 450, 50, 141),
    GpuSpec("H100", r"H100 80GB HBM3", 989.4, 66.9, 3350, 450, 50, 80),  # SXM
    GpuSpec("H100-NVL", r"H[12]00 NVL", 835.5, 60.0, 3900, 300, 25, 94),
    GpuSpec("H100-PCIe", r"H100 PCIe", 756.0, 51.2, 2000, 64, 3.125, 80),
    GpuSpec(
        "A100", r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", 312.0, 19.5, 2039, 300, 25, 80
    ),  # SXM; there is one with 40 GB
    GpuSpec("A30", r"A30", 165.0, 10.3, 933, 32, 3.125, 24),
    GpuSpec("A10", r"A10", 125.0, 31.2, 600, 32, 3.125, 24),
    GpuSpec("A40", r"A40", 149.7, 37.4, 696, 32, 3.125, 48),
    GpuSpec("A6000", r"RTX A6000", 154.8, 38.7, 768, 32, 3.125, 48),
    GpuSpec("L40S", r"L40S", 362.0, 91.6, 864, 32, 3.125, 48),
    GpuSpec("L40", r"L40", 181.0, 90.5, 864, 32, 3.125, 48),
    GpuSpec("L4", r"L4", 121.0, 30.3, 300, 32, 3.125, 24),
    GpuSpec("RTX6000-Ada", r"RTX 6000 Ada Generation", 364.2, 91.1, 960, 32, 3.125, 48),
    GpuSpec("RTX5090", r"GeForce RTX 5090", 209.5, 104.8, 1792, 64, 3.125, 32),
    GpuSpec("RTX4090", r"GeForce RTX 4090", 165.2, 82.6, 1008, 32, 3.125, 24),
    GpuSpec("RTX3090", r"GeForce RTX 3090", 71.0, 35.6, 936, 32, 3.125, 24),
)


def spec_of_device(name: str) -> GpuSpec | None:
    """The GPU that the driver calls `name`; None if it is not in the table."""
    for spec in GPUS:
        if re.fullmatch(f"(NVIDIA )?({spec.pattern})", name):
            return spec
    return None


def spec_named(name: str) -> GpuSpec:
    """The GPU of the table with this name. Raises UserError if there is none."""
    for spec in GPUS:
        if spec.name.lower() == name.lower():
            return spec
    raise UserError(
        f"--gpu {name} is not known → one of {', '.join(spec.name for spec in GPUS)}; to plan for "
        "another one, without its speed, --memory 32GB is enough"
    )
