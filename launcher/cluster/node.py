"""The program that srun starts once on each node of a job. It becomes the node's torchrun.

    srun … python -m launcher.cluster.node RUN/logs/attempt-N

Each node's torchrun knows only its own ranks. The ranks compute their global ranks and find each
other through a file in the attempt's folder (launcher/distributed/rendezvous.py), so no port has to
be chosen in advance, and no node waits for another node's agent. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from launcher.cluster import command
from launcher.cluster.gpus import visible_gpus
from launcher.cluster.numa import numa_mode
from launcher.config import store
from launcher.config.rules.rule import Machine, World
from launcher.errors import BadNode, UserError, exit_when_refused
from launcher.folders.run import RunDir
from launcher.run import stop

SHARED_SECONDS = 5  # until another machine sees a new file


def main() -> None:
    # Slurm signals every process of the step. A blocked signal waits for the agent and the ranks.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
    if len(sys.argv) != 2 or "SLURM_NODEID" not in os.environ:
        raise UserError("usage: srun … python -m launcher.cluster.node RUN/logs/attempt-N")
    if os.environ["SLURM_NODEID"] != "0":
        refuse_other_folder(Path(sys.argv[1]))
    run = RunDir.from_logs(Path(sys.argv[1]))
    gpus = visible_gpus()
    config = store.load(run.config)
    world = World.from_config(config, Machine(gpus=gpus))
    node = int(os.environ["SLURM_NODEID"])
    # At least the GPUs that were requested: a rank that finds none refuses to run on the CPU.
    environment = command.rank_environment(world.nproc_per_node, max(gpus, world.gpus))
    environment |= {
        "SHARDWAY_NODE": str(node),
        "SHARDWAY_NODES": os.environ["SLURM_NNODES"],
        "SHARDWAY_RENDEZVOUS": str(run.rendezvous),
    }
    log = os.open(run.agent_log(node), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 2)
    mode = numa_mode(config.cluster, world.nproc_per_node, gpus)
    torchrun = command.torchrun_command(run.path, run.attempt, world.nproc_per_node, mode)
    os.execve(torchrun[0], torchrun, environment)


def refuse_other_folder(logs: Path) -> None:
    """Raise BadNode if this machine does not see the attempt's folder that the first node has made.

    The ranks of the others would wait for those of this node.
    """
    end, node = time.monotonic() + SHARED_SECONDS, os.environ.get("SLURMD_NODENAME", "")
    while True:
        with suppress(OSError):
            os.listdir(logs.parent)  # NFS may have cached that this attempt did not exist
            if "job.json" in os.listdir(logs):
                return
        if time.monotonic() > end:
            raise BadNode(
                f"{node} does not see {logs}, which the job's first node has made: run_dir must be "
                f"on a file system that all nodes share → another run_dir, or --exclude={node}"
            )
        time.sleep(0.2)


def has_absent_node(run: RunDir, count: int) -> bool:
    """Whether some of the job's `count` nodes have begun, and another has not: it could not."""
    begun = [run.agent_log(node).exists() for node in range(count)]
    return any(begun) and not all(begun)


if __name__ == "__main__":
    with exit_when_refused():
        main()
