"""The status of a run: its state, metrics, Slurm job. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import Config
from launcher.errors import UserError
from launcher.folders.json_file import read_object
from launcher.folders.run import RunDir
from launcher.run import processes, sweep

NO_ATTEMPT = "ended before it began"  # the state of a run whose job has made no attempt


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
    runs = [RunDir(file.parent) for file in folder.glob("*/config.yaml")]
    runs += [
        run for index in folder.glob(f"*/{sweep.INDEX}") for run in sweep.list_runs(index.parent)
    ]
    return sorted(runs, key=lambda run: run.config.stat().st_mtime)


def find_run(path: Path) -> RunDir:
    """The newest attempt of the run in `path`. Raises UserError if it is not a run folder."""
    run = RunDir(path.absolute())
    if not run.config.is_file():
        raise UserError(f"{path} is not a run folder (it has no config.yaml)")
    return run.newest_attempt()


def slurm_job_id(run: RunDir) -> str | None:
    """The Slurm job that `run` was last queued as, by `shardway train` or by sbatch; None if it
    never was."""
    for file in (run.submitted, run.newest_attempt().job):
        if file.is_file():
            return str(json.loads(file.read_text(encoding="utf-8"))["job"])
    return None


def run_state(run: RunDir, queued: QueuedJob | None) -> str:
    """Slurm's state of the job while there is one; otherwise how the newest attempt ended."""
    if queued:
        return queued.state.lower()
    if ended_before_attempt(run):
        return NO_ATTEMPT
    if run.status.is_file():
        return str(json.loads(run.status.read_text())["state"])
    return "running" if processes.living(run) else "failed" if run.attempt else "not started"


def ended_before_attempt(run: RunDir) -> bool:
    """Whether the run's job, which is in the queue no more, ended before its attempt began: a line
    of cluster.setup failed, or Python does not find Shardway. Its log says why."""
    if run.starting.is_file():
        return True
    job = slurm_job_id(run)
    if job is None or not run.job_console(job).is_file():
        return False  # it never started
    attempts = (RunDir(run.path, number).job for number in range(run.attempt, 0, -1))
    return not any(file.is_file() and _job_in(file) == job for file in attempts)


def _job_in(file: Path) -> str | None:
    """The job that a job.json names; None if it is damaged."""
    try:
        return str(read_object(file)["job"])
    except (UserError, KeyError):
        return None


def read_metrics(run: RunDir) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, empty if the file does not exist yet. Raises UserError for a
    line that is not a record."""
    if not run.metrics.is_file():
        return []
    records = []
    lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("}"):
            break  # it is being written
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{run.metrics}, line {number} is not a record: {error}") from error
        records.append(record)
    return records


def total_steps(run: RunDir, config: Config) -> int | None:
    """The steps of the complete training; None while only the number of epochs is known."""
    if run.steps.is_file():
        return int(json.loads(run.steps.read_text())["total_steps"])
    return config.training.max_steps


def time_left(steps: list[dict[str, Any]], total: int | None) -> str:
    """`h:mm:ss` at the speed of the last hundred logged steps; empty if it is unknown."""
    recent = steps[-100:]
    if total is None or len(recent) < 2:
        return ""
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    seconds = int(pace * (total - recent[-1]["step"]))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
