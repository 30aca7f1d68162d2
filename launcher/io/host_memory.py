"""How much memory the processes of this container or job may use together. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import psutil

from launcher.io import cgroups


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes: the machine's memory, or the limit of a cgroup that is smaller.

    `root` is where /proc and the cgroups are.
    """
    return min([psutil.virtual_memory().total, *cgroups.limits(root, "memory", _read_limit)])


def _read_limit(folder: Path) -> int | None:
    """The limit of a cgroup in bytes; None without one. Version 1 has a huge number for none."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # the other version, or `max`
            continue
    return None
