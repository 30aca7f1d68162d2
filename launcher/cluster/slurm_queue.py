"""Query Slurm's queue and cancel jobs. Imports neither torch nor Hydra: `shardway runs` answers at
once."""

from __future__ import annotations

from launcher.cluster.slurm_command import run_slurm
from launcher.run.status import QueuedJob

QUEUE_SECONDS = 30.0  # timeout of squeue: repeated queries must not accumulate


def query_queue(jobs: list[str]) -> dict[str, QueuedJob]:
    """Job number → state, for those of `jobs` that wait or run. Raises UserError if Slurm does not
    answer."""
    if not jobs:
        return {}
    command = ["squeue", f"--jobs={','.join(jobs)}", "--array", "--noheader", "--format=%i|%T|%R"]
    answer = run_slurm(command, allowed_error="Invalid job id", seconds=QUEUE_SECONDS)
    lines = (line.split("|", 2) for line in answer.splitlines())
    listed = {job: QueuedJob(state, nodes) for job, state, nodes in lines}
    return {job: listed[job] for job in jobs if job in listed}


def cancel_waiting(job: str) -> None:
    """Remove `job` from the queue if it still waits. A job that has started continues."""
    run_slurm(["scancel", "--state=PENDING", job])


def cancel(job: str) -> None:
    """Cancel `job`, whether it waits or runs."""
    run_slurm(["scancel", job])
