"""How many CPUs this process may use: its affinity, and the CPU quota of its cgroups.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that this process may keep busy, at least 1.

    A container or a job may run on all CPUs of a machine and yet have a quota of time, which
    neither os.cpu_count nor Python 3.13's os.process_cpu_count knows. A quota of 2.5 CPUs counts as
    2: more threads than that wait for each other. `root` is where /proc and the cgroups are.
    """
    return max(1, int(min([_affinity(), *_quotas(root)])))


def _affinity() -> int:
    # macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path) -> Iterator[float]:
    """The quotas of the process's cgroups and of the groups above them, in CPUs."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in groups:
        number, controllers, group = line.split(":", 2)
        kind = "cgroup2" if number == "0" else "cgroup"
        if kind == "cgroup2" or "cpu" in controllers.split(","):
            for top, folder in _folders(root, mounts, kind, group):
                yield from _quotas_upwards(top, folder)


def _folders(root: Path, mounts: list[str], kind: str, group: str) -> Iterator[tuple[Path, Path]]:
    """(mount point, folder of `group` below it) where cgroups with CPU quotas are mounted.

    proc_pid_mountinfo(5): ID, parent, device, root, mount point, options …, -, type, source, super
    options. A container may see only a part of the tree: `root` is the group at the mount point.
    """
    for line in mounts:
        fields, _, details = line.partition(" - ")
        file_system, _, options = (*details.split(), "", "", "")[:3]
        if file_system != kind or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        shown, point = fields.split()[3:5]
        top = root / point.lstrip("/")
        inside = os.path.relpath(group, shown)
        yield top, top if inside.startswith("..") else top / inside


def _quotas_upwards(top: Path, folder: Path) -> Iterator[float]:
    for level in (folder, *folder.parents):
        quota, period = _read_quota(level)
        if quota > 0 < period:
            yield quota / period
        if level == top:
            return


def _read_quota(folder: Path) -> tuple[int, int]:
    """(microseconds of CPU time, in this many microseconds); (-1, 1) without a limit."""
    try:
        if (file := folder / "cpu.max").is_file():  # version 2
            quota, period = file.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota), int(period)
    except (OSError, ValueError):  # the group at the top has no files; `max` is not a number
        return -1, 1
