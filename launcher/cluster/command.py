"""The one torchrun command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def torchrun(run_dir: Path, attempt: int, nproc_per_node: int, deaf: bool = False) -> list[str]:
    """One agent on this machine. `--standalone` binds a free port; a dead rank ends the run.
    `deaf`: the agent takes no signal but SIGINT."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        "--standalone",
        f"--nproc-per-node={nproc_per_node}",
        "--max-restarts=0",
        *(["--signals-to-handle=SIGINT"] if deaf else []),
        *("-m", "launcher.worker", str(run_dir), str(attempt)),
    ]


def environment(nproc_per_node: int, gpus: int) -> dict[str, str]:
    """This process's environment with the threads of a CPU run shared out among the ranks.

    torchrun would give each of several ranks one thread, whatever the machine has.
    """
    values = dict(os.environ)
    values["SHARDWAY_GPUS"] = str(gpus)  # a rank that sees none where there are some refuses
    cores = len(os.sched_getaffinity(0))
    values.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc_per_node) if not gpus else 1))
    if gpus:
        values.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return values
