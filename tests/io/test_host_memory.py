"""The memory that a container or a job may use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.io import host_memory
from tests.io import test_cpus

GIB = 1 << 30


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GIB))


def machine(root: Path, limits: dict[str, str]) -> Path:
    """A machine with cgroups of version 2: folder → memory.max."""
    test_cpus.tree(root, "/a/b", "/", {}, version=2)
    for folder, limit in limits.items():
        at = root / "sys/fs/cgroup" / folder
        at.mkdir(parents=True, exist_ok=True)
        (at / "memory.max").write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 64 * GIB),
        ({"a/b": "max"}, 64 * GIB),
        ({"a/b": str(8 * GIB)}, 8 * GIB),
        ({"a/b": str(32 * GIB), "a": str(16 * GIB)}, 16 * GIB),
        ({"a/b": str(128 * GIB)}, 64 * GIB),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    assert host_memory.usable_memory(machine(tmp_path, limits)) == expected


def test_a_limit_of_version_1_counts_too(tmp_path: Path) -> None:
    process = tmp_path / "proc/self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text("4:memory:/a\n0::/\n")
    mount = "32 31 0:29 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    (process / "mountinfo").write_text(mount)
    (group := tmp_path / "sys/fs/cgroup/memory/a").mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    assert host_memory.usable_memory(tmp_path) == 4 * GIB


def test_without_linux_the_machine_counts(tmp_path: Path) -> None:
    assert host_memory.usable_memory(tmp_path) == 64 * GIB
