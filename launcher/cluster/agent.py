"""torchrun's agent, which starts the ranks of one machine, with other signals.

    python -m launcher.cluster.agent FLAGS_OF_TORCHRUN… -m launcher.worker RUN ATTEMPT

A signal asks the ranks to save and end, like a signal to a rank; torchrun would pass it on and kill
ranks that need more than 30 seconds. A second request ends the agent at once, and its ranks with
it. If `shardway train` is killed, that is a request too: nobody waits for the run any more.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from launcher.cluster.watchdog import Watchdog
from launcher.config import store
from launcher.config.schema.cluster import hang_seconds
from launcher.errors import UserError, exit_when_refused
from launcher.folders.run import RunDir
from launcher.io import garbage, open_files
from launcher.run import heartbeat, parent
from launcher.run.heartbeat import Board
from launcher.run.stop import StopRequest

USAGE = "python -m launcher.cluster.agent FLAGS_OF_TORCHRUN… -m launcher.worker RUN ATTEMPT"


def main() -> None:
    """Start the ranks and wait for them, with torchrun's exit status."""
    if sys.argv[-4:-2] != ["-m", "launcher.worker"]:
        raise UserError(f"usage: {USAGE}")
    path, attempt = sys.argv[-2:]
    run = RunDir.from_logs(Path(path, "logs", f"attempt-{attempt}"))
    stop = StopRequest(run)
    stop.listen(as_rank=False)
    starter = os.environ.pop("SHARDWAY_LAUNCHER", None)
    if starter is not None:
        parent.signal_when_parent_dies(signal.SIGTERM)
        if str(os.getppid()) != starter:
            stop.request(signal.SIGTERM.name)
    os.environ["SHARDWAY_AGENT"] = str(os.getpid())
    open_files.raise_limit(ranks=1)  # each rank checks whether it is enough for all of them
    garbage.collect_seldom()
    from torch.distributed.run import main as torchrun

    with tempfile.TemporaryDirectory(prefix="torchrun-") as folder:  # torchrun leaves its own
        _watch(stop, run, Path(folder))
        sys.argv[1:1] = ["--log-dir", folder]
        torchrun()


def _watch(stop: StopRequest, run: RunDir, folder: Path) -> None:
    """Watch the ranks that torchrun will start, unless cluster.hang_seconds is 0."""
    cluster = store.load(run.config).cluster
    seconds = hang_seconds(cluster)
    if seconds == 0:
        return
    (ranks,) = (word for word in sys.argv if word.startswith("--nproc-per-node="))
    board = Board(int(ranks.partition("=")[2]))
    os.environ[heartbeat.VARIABLE] = str(board.path)
    Watchdog(run, board, seconds, lambda: stop.reason() is not None, folder).start()


if __name__ == "__main__":
    with exit_when_refused():
        main()
