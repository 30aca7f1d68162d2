"""The time that a Slurm job takes to requeue: signal, checkpoint, queue, first new step.

    python tools/bench_requeue.py model=tiny cluster.nodes=2 strategy=fsdp
    python tools/bench_requeue.py --rounds 3 cluster.partition=gpu cluster.gpus_per_node=8 …

Submits one job to your cluster with these overrides, sends it USR2 repeatedly, and reads the times
from its run folder. Quote the medians; the wait in the queue depends on the cluster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.cluster import slurm_queue
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run.status import slurm_job_id

PARTS = (
    "signal → checkpoint is whole",
    "checkpoint → in the queue again",
    "in the queue → job has begun",
    "job has begun → first new step",
)
WARM_UP_STEPS, PATIENCE_SECONDS = 5, 600


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-requeue-") as scratch:
        run = RunDir(Path(scratch).absolute() / "run", 0)
        endless = ["training.epochs=null", "training.max_steps=1000000", "training.log_steps=1"]
        command = ["train", "cluster=slurm", f"run_dir={run.path}", *endless, *overrides]
        subprocess.run([sys.executable, "-m", "launcher.cli", *command], check=True)
        job = slurm_job_id(run)
        assert job is not None
        try:
            seconds = [round_of(run.path, job, number) for number in range(arguments.rounds)]
        finally:
            slurm_queue.cancel(job)
            _until(lambda: job not in slurm_queue.query_queue([job]), "the job ends")
    print(f"\n{arguments.rounds} rounds, seconds: median (least – most)")
    for name, values in zip(PARTS, zip(*seconds, strict=True), strict=True):
        print(
            f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} – {max(values):.1f}) |"
        )


def round_of(path: Path, job: str, number: int) -> tuple[float, ...]:
    """The seconds that each of PARTS takes in one round."""
    before, after = RunDir(path, number + 1), RunDir(path, number + 2)
    _until(lambda: _steps_since(before) >= WARM_UP_STEPS, f"attempt {before.attempt} trains")
    signaled = time.time()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    _until(before.status.is_file, "it saves and stops")
    saved = json.loads(before.status.read_text())["step"]
    whole = (before.checkpoints / f"step-{saved:06d}" / "manifest.json").stat().st_mtime
    _until(
        lambda: slurm_queue.query_queue([job])[job].state != "RUNNING",
        "it goes back into the queue",
    )
    queued = time.time()
    _until(after.job.is_file, f"attempt {after.attempt} begins")
    begun = after.job.stat().st_mtime
    _until(lambda: _steps_since(after) > 0, "it trains")
    first = next(_records_since(after))["time"]
    times = (signaled, whole, queued, begun, first)
    return tuple(b - a for a, b in itertools.pairwise(times))


def _records_since(run: RunDir) -> Iterator[dict[str, Any]]:
    """The records that the current attempt has written."""
    if run.job.is_file() and run.metrics.is_file():
        lines = run.metrics.read_text().splitlines()
        records = (json.loads(line) for line in lines if line.endswith("}"))
        yield from (each for each in records if each["time"] > run.job.stat().st_mtime)


def _steps_since(run: RunDir) -> int:
    return sum(1 for _ in _records_since(run))


def _until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not true():
        if time.monotonic() > end:
            raise UserError(f"waited {PATIENCE_SECONDS} s until {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
