"""The CPUs that a process may use, with quotas of real cgroups where this machine has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.io import cpus

V1 = "12:cpu,cpuacct:{group}\n4:memory:/elsewhere\n0::/\n"
V1_MOUNT = "32 31 0:29 {shown} /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n"
V2 = "0::{group}\n"
V2_MOUNT = "30 24 0:26 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def tree(root: Path, group: str, shown: str, quotas: dict[str, str], version: int) -> None:
    """A machine's /proc and cgroups: folder below the mount point → quota and period."""
    process = root / "proc/self"
    process.mkdir(parents=True)
    groups, mounts = (V1, V1_MOUNT) if version == 1 else (V2, V2_MOUNT)
    (process / "cgroup").write_text(groups.format(group=group))
    (process / "mountinfo").write_text("23 1 0:21 / / rw - ext4 /dev/a rw\n")
    with (process / "mountinfo").open("a") as file:
        file.write(mounts.format(shown=shown))
    for folder, quota in quotas.items():
        at = root / "sys/fs/cgroup" / ("cpu" if version == 1 else "") / folder
        at.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (at / "cpu.max").write_text(f"{quota}\n")
        else:
            (at / "cpu.cfs_quota_us").write_text(f"{quota.split()[0]}\n")
            (at / "cpu.cfs_period_us").write_text(f"{quota.split()[1]}\n")


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a/b": "400000 100000"}, 4),
        ({"a/b": "250000 100000"}, 2),
        ({"a/b": "50000 100000"}, 1),
        ({"a/b": "100000 50000", "a": "800000 100000"}, 2),
        ({"a/b": "800000 100000", "a": "300000 100000"}, 3),
        ({"a/b": "800000 100000", ".": "600000 100000"}, 6),
        ({"a/b": "9900000 100000"}, 64),
        ({"a": "-1 100000"}, 64),
        ({"a": "max 100000"}, 64),
        ({}, 64),
    ],
)
def test_the_lowest_quota_of_a_group_and_those_above_it_counts(
    tmp_path: Path, version: int, quotas: dict[str, str], expected: int
) -> None:
    tree(tmp_path, "/a/b", "/", quotas, version)
    assert cpus.usable_cpus(tmp_path) == expected


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_sees_its_group_at_the_mount_point(tmp_path: Path, version: int) -> None:
    tree(tmp_path, "/docker/c1", "/docker/c1", {".": "300000 100000"}, version)
    assert cpus.usable_cpus(tmp_path) == 3
    (tmp_path / "proc/self/cgroup").write_text((V1, V2)[version - 1].format(group="/../other"))
    assert cpus.usable_cpus(tmp_path) == 3, "outside of what is mounted: the top counts"


def test_a_machine_without_cgroups_counts_its_affinity(tmp_path: Path) -> None:
    assert cpus.usable_cpus(tmp_path) == 64


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A real cgroup with a quota of one CPU."""
    for top, file, quota in (
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "100000"),
        ("/sys/fs/cgroup", "cpu.max", "100000 100000"),
    ):
        folder = Path(top) / f"shardway-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(quota)
            yield folder
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("this machine lets no test create a cgroup")


def test_a_real_quota_counts(real_group: Path) -> None:
    ask = "from launcher.io.cpus import usable_cpus; print(usable_cpus())"
    enter = f'echo $$ > {real_group}/cgroup.procs && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, "-c", ask],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1\n"
