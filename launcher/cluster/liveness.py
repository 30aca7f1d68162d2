"""Whether a run goes on somewhere: its processes, and its Slurm job. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.cluster import slurm_queue
from launcher.config import Config
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run import processes, status


def is_alive(path: Path) -> bool:
    """Whether the run at `path` has processes, or a job that waits or runs.

    Raises UserError if Slurm does not answer.
    """
    run = status.find_run(path)
    job = status.known_job_id(run)
    if job and slurm_queue.query_queue([job]):
        return True
    # Slurm knows better than the age of a record whether the processes of its job still exist.
    return any(process.is_here or not (job and process.job) for process in processes.living(run))


def refuse_if_alive(run: RunDir) -> None:
    """Raise UserError if a process of the run exists, or if its job waits or runs: two attempts
    never train in one folder."""
    job = status.known_job_id(run)
    if job and shutil.which("squeue") and slurm_queue.query_queue([job]):
        raise UserError(f"{run.path} is job {job} already; stop it first: shardway stop {run.path}")
    processes.refuse_if_running(run.newest_attempt())


def refuse_to_join(config: Config) -> None:
    """Raise UserError if `config` would continue a run that has not ended."""
    if config.resume == "auto" and config.run_dir:
        run = RunDir(Path(config.run_dir).absolute())
        if run.has_config:
            refuse_if_alive(run)
