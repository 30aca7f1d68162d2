"""The command line of torchrun, and its environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cluster import command


def test_cores_are_shared_among_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("launcher.cluster.command.usable_cpus", lambda: 8)
    assert command.rank_environment(2, gpus=0)["OMP_NUM_THREADS"] == "4"
    assert command.rank_environment(16, gpus=0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert command.rank_environment(2, gpus=0)["OMP_NUM_THREADS"] == "3"


def test_the_command_keeps_unusual_paths_intact() -> None:
    argv = command.torchrun_command(Path("/runs/a b;c"), 1, 2)
    assert argv[-4:] == ["-m", "launcher.worker", "/runs/a b;c", "1"]


def test_what_another_launch_left_in_the_environment_does_not_reach_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = ("PET_NNODES", "PET_NO_PYTHON", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    left += ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SHARDWAY_NODES", "PYTHON_EXEC")
    for name in left:
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = command.rank_environment(2, gpus=0)
    assert not environment.keys() & set(left)
    assert environment["NCCL_DEBUG"] == "INFO"
