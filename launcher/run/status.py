"""The status of a run: its state, metrics, Slurm job. Imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.brief import brief
from launcher.folders.json_file import COUNT, TEXT, DamagedFile, Field, read_fields
from launcher.folders.run import RunDir, runs_in
from launcher.run import processes, sweep

NO_ATTEMPT = "ended before it began"  # the state of a run whose job has made no attempt

# As Slurm numbers it; ARRAY_INDEX for a task of an array.
JOB: Field = (
    lambda value: re.fullmatch(r"[0-9]{1,20}(_[0-9]{1,20})?", str(value)) is not None,
    "the number of a job",
)
REASON_LENGTH = 300  # letters of what a status.json says
DAMAGED = "damaged"  # the state of a run whose status.json cannot be read


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue lists it."""

    state: str
    nodes: str  # while the job waits: the reason


def find_runs(folder: Path) -> list[RunDir]:
    """The runs of a sweep in their order; otherwise all runs in `folder` and in its sweeps, the
    newest last."""
    if sweep.is_sweep(folder):
        return sweep.list_runs(folder)
    runs = runs_in(folder)
    runs += [
        run for index in folder.glob(f"*/{sweep.INDEX}") for run in sweep.list_runs(index.parent)
    ]
    return sorted(runs, key=_modified)


def _modified(run: RunDir) -> float:
    try:
        return run.config.stat().st_mtime
    except (OSError, UserError):  # it is being deleted, or leads out of the run folder
        return 0.0


def find_run(path: Path) -> RunDir:
    """The newest attempt of the run in `path`. Raises UserError if it is not a run folder."""
    run = RunDir(path.absolute())
    if not run.has_config:
        copy = max(run.path.glob("checkpoints/step-*/config.yaml"), default=None)
        way_out = f" → copy that of a checkpoint: {copy}" if copy else ""
        raise UserError(f"{path} is not a run folder: it has no config.yaml{way_out}")
    return run.newest_attempt()


def slurm_job_id(run: RunDir) -> str | None:
    """The Slurm job that `run` was last queued as, by `shardway train` or by sbatch; None if it
    never was. Raises DamagedFile if the files that say so cannot be read."""
    damage: DamagedFile | None = None
    for file in (run.submitted, run.newest_attempt().job):
        try:
            if file.is_file():
                return job_in(file)
        except DamagedFile as error:
            damage = damage or error
    if damage is not None:
        raise damage
    return None


def known_job_id(run: RunDir) -> str | None:
    """The same; None, with a message on stderr, if the files cannot be read."""
    try:
        return slurm_job_id(run)
    except DamagedFile as error:
        print(f"{error}; if it has a job, squeue shows that", file=sys.stderr)
        return None


def run_state(run: RunDir, queued: QueuedJob | None) -> str:
    """Slurm's state of the job while there is one; otherwise how the newest attempt ended. Raises
    DamagedFile if the file that says so cannot be read."""
    if queued:
        return queued.state.lower()
    if ended_before_attempt(run):
        return NO_ATTEMPT
    if run.status.is_file():
        state = str(read_fields(run.status, state=TEXT)["state"])
        if not state.strip() or not state.isprintable():
            raise DamagedFile(run.status, f"is damaged: its state is {brief(state)}")
        return state
    return "running" if processes.living(run) else "failed" if run.attempt else "not started"


def hung_reason(run: RunDir) -> str:
    """Which rank the others waited for when nothing moved any more; empty if the attempt has not
    hung. Raises DamagedFile."""
    if not run.status.is_file():
        return ""
    if read_fields(run.status, state=TEXT)["state"] != "hung":
        return ""
    reason = read_fields(run.status, reason=TEXT)["reason"]
    return "".join(each for each in reason if each.isprintable())[:REASON_LENGTH]


def ended_before_attempt(run: RunDir) -> bool:
    """Whether the run's job, which is in the queue no more, ended before its attempt began: a line
    of cluster.setup failed, or Python does not find Shardway. Its log says why."""
    if run.starting.is_file():
        return True
    try:
        job = slurm_job_id(run)
    except DamagedFile:
        return False  # unknown
    if job is None or not run.job_console(job).is_file():
        return False  # it never started
    attempts = (RunDir(run.path, number).job for number in range(run.attempt, 0, -1))
    return not any(_names(file, job) for file in attempts)


def job_in(file: Path) -> str:
    """The job that a slurm.json or job.json names. Raises DamagedFile."""
    return str(read_fields(file, job=JOB)["job"])


def _names(file: Path, job: str) -> bool:
    """Whether the job.json `file` is there, whole, and names this job."""
    try:
        return file.is_file() and job_in(file) == job
    except DamagedFile:
        return False


def total_steps(run: RunDir, max_steps: int | None) -> int | None:
    """The steps of the complete training; None while only the number of epochs is known.

    `max_steps`: the setting, for runs whose ranks have not reported the steps yet. Raises
    DamagedFile if the file with them cannot be read.
    """
    if run.steps.is_file():
        return int(read_fields(run.steps, total_steps=COUNT)["total_steps"])
    return max_steps


def time_left(pace: Sequence[tuple[int, float]], total: int | None) -> str:
    """`h:mm:ss` at the speed of the last logged steps, `pace` as (step, time); empty if it is
    unknown."""
    if total is None or len(pace) < 2 or pace[-1][0] <= pace[0][0]:
        return ""
    seconds_per_step = (pace[-1][1] - pace[0][1]) / (pace[-1][0] - pace[0][0])
    return format_duration(max(0.0, seconds_per_step * (total - pace[-1][0])))


def format_duration(seconds: float) -> str:
    """`h:mm:ss`."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"
