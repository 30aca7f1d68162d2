"""Whether torchrun binds each rank to the CPUs next to its GPU. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.config.schema.cluster import ClusterConfig
from launcher.errors import UserError


def numa_mode(cluster: ClusterConfig, ranks: int, gpus: int, root: Path = Path("/")) -> str | None:
    """The mode for torchrun's --numa-binding on this machine, None for none.

    `ranks` and `gpus` are those of this machine; `root` is where /sys is. Raises UserError if
    cluster.numa_binding asks for what this machine cannot do.
    """
    asked = cluster.numa_binding
    if asked == "none":
        return None
    reason = _reason_against(ranks, gpus)
    if asked != "auto":
        if reason:
            raise UserError(
                f"cluster.numa_binding={asked}: {reason} → cluster.numa_binding=none, or auto"
            )
        return asked
    # Every node must have CPUs for its ranks: a job may have been given those of one node only.
    cpus = list(_usable_cpus_of_nodes(root))
    return "node" if not reason and len(cpus) > 1 and min(cpus) >= ranks else None


def _reason_against(ranks: int, gpus: int) -> str:
    """Why torchrun cannot bind ranks here; empty if it can."""
    if gpus < ranks:
        return "each rank runs on the CPUs next to its GPU, but there are fewer GPUs than ranks"
    if shutil.which("numactl") is None:
        return "torchrun needs the program numactl, which is not installed"
    return ""


def _usable_cpus_of_nodes(root: Path) -> Iterator[int]:
    """For each node of memory that has CPUs, how many of them this process may use."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    for file in sorted(root.glob("sys/devices/system/node/node*/cpulist")):
        if cpus := set(_numbers(file.read_text(encoding="utf-8"))):
            yield len(cpus & allowed)


def _numbers(ranges: str) -> Iterator[int]:
    """The numbers in a text such as 0-3,8."""
    for part in filter(None, ranges.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)
