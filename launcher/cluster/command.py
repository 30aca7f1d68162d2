"""The torchrun command line and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.io.cpus import usable_cpus

# What torchrun sets for its ranks. Left over from another launch, it would describe that one.
SET_BY_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
# What launcher/cluster/node.py tells the ranks of a job.
SET_BY_NODE = ("SHARDWAY_NODE", "SHARDWAY_NODES", "SHARDWAY_RENDEZVOUS")


def torchrun_command(
    run_dir: Path, attempt: int, nproc_per_node: int, numa_mode: str | None = None
) -> list[str]:
    """One agent on this machine. `--standalone` binds a free port; a rank that dies ends the run.

    The agent (launcher/cluster/agent.py) receives signals before torchrun's own handlers can.
    `numa_mode`: of launcher/cluster/numa.py.
    """
    return [
        *(sys.executable, "-m", "launcher.cluster.agent"),
        "--standalone",
        "--nnodes=1",
        f"--nproc-per-node={nproc_per_node}",
        "--max-restarts=0",
        "--signals-to-handle=SIGINT",  # SIGHUP stays ignored under nohup
        *([f"--numa-binding={numa_mode}"] if numa_mode else []),
        *("-m", "launcher.worker", str(run_dir), str(attempt)),
    ]


def rank_environment(nproc_per_node: int, gpus: int) -> dict[str, str]:
    """The environment of the ranks: this process's own without what describes another launch, and
    with the cores divided among CPU ranks.

    torchrun would give one thread to each of several ranks, however many cores there are.
    """
    values = {key: value for key, value in os.environ.items() if not _is_of_another_launch(key)}
    values["SHARDWAY_GPUS"] = str(gpus)  # a rank that finds none of these GPUs refuses to run
    threads = 1 if gpus else max(1, usable_cpus() // nproc_per_node)
    values.setdefault("OMP_NUM_THREADS", str(threads))
    return values


def _is_of_another_launch(key: str) -> bool:
    """Whether a variable comes from another launch, or is a default of one of torchrun's flags:
    PET_NNODES is --nnodes, and PET_NO_PYTHON could not be taken back by a flag."""
    return key.startswith(("PET_", "TORCHELASTIC_")) or key in (
        *SET_BY_TORCHRUN,
        *SET_BY_NODE,
        "PYTHON_EXEC",  # the Python with which torchrun starts the ranks
    )
