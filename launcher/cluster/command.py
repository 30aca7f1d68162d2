"""The torchrun command line and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def torchrun_command(run_dir: Path, attempt: int, nproc_per_node: int) -> list[str]:
    """One agent on this machine. `--standalone` binds a free port; a rank that dies ends the run.

    The agent (launcher/agent.py) receives signals before torchrun's own handlers can.
    """
    return [
        *(sys.executable, "-m", "launcher.agent"),
        "--standalone",
        f"--nproc-per-node={nproc_per_node}",
        "--max-restarts=0",
        "--signals-to-handle=SIGINT",  # SIGHUP stays ignored under nohup
        *("-m", "launcher.worker", str(run_dir), str(attempt)),
    ]


def rank_environment(nproc_per_node: int, gpus: int) -> dict[str, str]:
    """The environment of the ranks: this process's own, with the cores divided among CPU ranks.

    torchrun would give one thread to each of several ranks, however many cores there are.
    """
    values = dict(os.environ)
    values["SHARDWAY_GPUS"] = str(gpus)  # a rank that finds none of these GPUs refuses to run
    cores = len(os.sched_getaffinity(0))
    values.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc_per_node) if not gpus else 1))
    if gpus:
        values.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return values
