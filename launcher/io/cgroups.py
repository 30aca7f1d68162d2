"""The limits of this process's cgroups: of a container, or of a job. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def limits(root: Path, controller: str, read: Callable[[Path], T | None]) -> Iterator[T]:
    """What `read` finds in the folders of the process's cgroups and of the groups above them, with
    `controller` (cpu, memory) mounted as version 1 or 2. None: it found no limit.

    `root` is where /proc and the cgroups are.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in groups:
        number, controllers, group = line.split(":", 2)
        kind = "cgroup2" if number == "0" else "cgroup"
        if kind == "cgroup2" or controller in controllers.split(","):
            for top, folder in _folders(root, mounts, kind, group, controller):
                found = (read(level) for level in _upwards(top, folder))
                yield from (limit for limit in found if limit is not None)


def _folders(
    root: Path, mounts: list[str], kind: str, group: str, controller: str
) -> Iterator[tuple[Path, Path]]:
    """(mount point, folder of `group` below it) where cgroups with `controller` are mounted.

    proc_pid_mountinfo(5): ID, parent, device, root, mount point, options …, -, type, source, super
    options. A container may see only a part of the tree: `root` is the group at the mount point.
    """
    for line in mounts:
        fields, _, details = line.partition(" - ")
        file_system, _, options = (*details.split(), "", "", "")[:3]
        if file_system != kind or (kind == "cgroup" and controller not in options.split(",")):
            continue
        shown, point = fields.split()[3:5]
        top = root / point.lstrip("/")
        inside = os.path.relpath(group, shown)
        yield top, top if inside.startswith("..") else top / inside


def _upwards(top: Path, folder: Path) -> Iterator[Path]:
    for level in (folder, *folder.parents):
        yield level
        if level == top:
            return
