"""How many CPUs this process may use: its affinity, and the CPU quota of its cgroups.

Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.io import cgroups


def usable_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that this process may keep busy, at least 1.

    A container or a job may run on all CPUs of a machine and yet have a quota of time, which
    neither os.cpu_count nor Python 3.13's os.process_cpu_count knows. A quota of 2.5 CPUs counts as
    2: more threads than that wait for each other. `root` is where /proc and the cgroups are.
    """
    return max(1, int(min([_affinity(), *cgroups.limits(root, "cpu", _read_quota)])))


def _affinity() -> int:
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_quota(folder: Path) -> float | None:
    """The quota of a cgroup in CPUs; None without one."""
    try:
        if (file := folder / "cpu.max").is_file():  # version 2
            quota, period = file.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 < int(period) else None
    except (OSError, ValueError):  # the group at the top has no files; `max` is not a number
        return None
