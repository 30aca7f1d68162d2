"""What a run is planned for: the device of each rank, and the memory of a machine. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from launcher.cluster.gpu_specs import GB, GpuSpec
from launcher.cluster.gpus import visible_devices, visible_gpus
from launcher.config import Config
from launcher.config.rules.rule import World
from launcher.config.schema.cluster import SlurmConfig
from launcher.io.host_memory import usable_memory
from launcher.run.auto import Device

UNNAMED = Device("a GPU since Ampere", True, True, None)
CPU_PROCESSES = "cluster.cpu_processes"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a run is planned for. Sizes in bytes."""

    device: Device = UNNAMED  # of a rank; its memory if it is the CPU: that of the machine
    is_here: bool = False  # the device is this machine's
    host: int | None = None  # memory of a machine; None if unknown

    def of_rank(self, world: World) -> Device:
        """The device of each rank; of a CPU, its share of the memory."""
        device = self.device
        if device.is_gpu or device.memory is None:
            return device
        return dataclasses.replace(device, memory=device.memory // world.nproc_per_node)

    def describe(self, world: World) -> str:
        """Text such as `8 × H100 with 80.00 GB`."""
        device, count = self.of_rank(world), world.size
        if device.is_gpu:
            is_named = device.name != UNNAMED.name
            any_gpu = f"GPU{'s' if count > 1 else ''} that compute{'s' * (count == 1)} in bf16"
            text = f"{count} × {device.name}" if is_named else f"{count} {any_gpu}"
        else:
            text = f"{count} CPU process{'es' if count > 1 else ''}"
        if device.memory is not None:
            text += f", {'each ' * (count > 1)}with {size_text(device.memory)}"
        if self.is_here:
            text += ", as in this machine"
        return text + (f", on {world.nodes} machines" if world.nodes > 1 else "")


ANY_GPU = Target()


def size_text(size: int) -> str:
    """A number of bytes in GB, or in MB if it is less than one."""
    return f"{size / GB:,.2f} GB" if size >= GB else f"{size / 1e6:,.2f} MB"


def choose(
    config: Config, typed: Collection[str], gpu: GpuSpec | None, memory: int | None
) -> Target:
    """The GPU that is named, the CPU if the run asks for that, this machine's GPU, or one of which
    nothing is known.

    Args:
        typed: The settings that were typed.
        memory: Of a GPU, in bytes, if it is named.
    """
    if gpu is not None:
        return Target(device=Device(gpu.name, True, True, memory or round(gpu.memory * GB)))
    if memory is None and _is_on_cpu(config, typed):
        is_here = not isinstance(config.cluster, SlurmConfig)
        usable = usable_memory() if is_here else None
        return Target(device=Device("CPU", False, False, usable), is_here=is_here, host=usable)
    device, *_ = (*visible_devices(), UNNAMED)
    is_here = device is not UNNAMED
    # A plan compares with all of the memory: what others use may be free when the run starts.
    device = dataclasses.replace(device, memory=memory or device.memory, in_use=0)
    return Target(device=device, is_here=is_here, host=usable_memory() if is_here else None)


def _is_on_cpu(config: Config, typed: Collection[str]) -> bool:
    """Whether the ranks will run on CPU: a job without GPUs, or here without one, and somebody has
    said how many."""
    cluster = config.cluster
    if isinstance(cluster, SlurmConfig):
        return cluster.gpus_per_node == 0 and cluster.nproc_per_node is None
    says_so = CPU_PROCESSES in typed or cluster.cpu_processes > 1
    return says_so and cluster.nproc_per_node is None and not visible_gpus()
