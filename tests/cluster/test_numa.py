"""When torchrun binds ranks to the CPUs next to their GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cluster import command, numa
from launcher.config.schema.cluster import ClusterConfig
from launcher.errors import UserError


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


def machine(root: Path, *cpus: str) -> Path:
    """A /sys with nodes of memory, each with these CPUs."""
    for at, text in enumerate(cpus):
        folder = root / f"sys/devices/system/node/node{at}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("cpus", "gpus", "mode"),
    [
        (("0-7", "8-15"), 4, "node"),
        (("0-3,8-11", "4-7,12-15"), 4, "node"),
        (("0-15",), 4, None),  # one node
        (("0-7", "8-15"), 0, None),  # ranks on CPU
        (("0-15", ""), 4, None),  # a node that is memory alone
        (("0-15", "16-31"), 4, None),  # a job with the CPUs of one node
        (("0-12", "13-15"), 4, None),  # too few for four ranks
        ((), 4, None),  # no Linux
    ],
)
def test_auto_binds_where_every_node_has_cpus_for_its_ranks(
    tmp_path: Path, cpus: tuple[str, ...], gpus: int, mode: str | None
) -> None:
    assert numa.numa_mode(ClusterConfig(), 4, gpus, machine(tmp_path, *cpus)) == mode


def test_without_numactl_auto_binds_nothing_and_a_mode_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    root = machine(tmp_path, "0-7", "8-15")
    assert numa.numa_mode(ClusterConfig(), 4, 4, root) is None
    with pytest.raises(UserError, match=r"numa_binding=socket: .* numactl.* → .*numa_binding=none"):
        numa.numa_mode(ClusterConfig(numa_binding="socket"), 4, 4, root)


def test_a_mode_is_used_as_it_is_and_none_binds_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, "0-7", "8-15")
    assert numa.numa_mode(ClusterConfig(numa_binding="none"), 4, 4, root) is None
    assert numa.numa_mode(ClusterConfig(numa_binding="exclusive"), 4, 4, root) == "exclusive"
    with pytest.raises(UserError, match="fewer GPUs than ranks"):
        numa.numa_mode(ClusterConfig(numa_binding="node"), 4, 0, root)


def test_the_mode_is_a_flag_of_torchrun() -> None:
    assert "--numa-binding=node" in command.torchrun_command(Path("r"), 1, 4, "node")
    assert not any("numa" in word for word in command.torchrun_command(Path("r"), 1, 4))


def test_torchrun_knows_every_mode() -> None:
    from torch.numa.binding import AffinityMode

    choices = ClusterConfig.__dataclass_fields__["numa_binding"].metadata["choices"]
    assert {mode.value for mode in AffinityMode} == {*choices} - {"auto", "none"}
