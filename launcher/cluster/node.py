"""What srun starts once on each node of a job: this process becomes the node's torchrun.

    srun … python -m launcher.cluster.node RUN/logs/attempt-N

Each node's torchrun knows its own ranks only; they make themselves ranks of the whole job and meet
through a file in the attempt's folder (launcher/distributed/nodes.py). So no port is agreed on
beforehand, and no node waits for another's agent. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from launcher.cluster import command
from launcher.cluster.devices import visible_gpus
from launcher.config import store
from launcher.config.rule import World
from launcher.run_dir import RunDir


def main() -> None:
    run = RunDir.of_logs(Path(sys.argv[1]))
    gpus = visible_gpus()
    world = World.of(store.load(run.config), gpus)
    node = int(os.environ["SLURM_NODEID"])
    # As many as were asked for: ranks that see none of them refuse, instead of using the CPU.
    values = command.environment(world.nproc_per_node, max(gpus, world.gpus))
    values |= {
        "SHARDWAY_NODE": str(node),
        "SHARDWAY_NODES": os.environ["SLURM_NNODES"],
        "SHARDWAY_MEETING": str(run.meeting),
    }
    # Slurm signals every process of the step. The ranks save and end; their agent, which would end
    # them at once, does not hear it: what is ignored stays ignored in the program that follows.
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.listdir(run.logs.parent)  # NFS may remember that this attempt was not there yet
    log = os.open(run.agent_log(node), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 2)
    words = command.torchrun(run.path, run.attempt, world.nproc_per_node, deaf=True)
    os.execve(words[0], words, values)


if __name__ == "__main__":
    main()
