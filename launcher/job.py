"""What the batch script asks on a job's first node: begin an attempt, and end it. Imports no torch.

python -m launcher.job begin --run RUN | OVERRIDES…     prints RUN/logs/attempt-N
python -m launcher.job end RUN/logs/attempt-N           its status; back into the queue
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import manifest, overview, rank_log, run_dir, sweep, train
from launcher.checkpoint import layout
from launcher.cluster import compiled, local
from launcher.config import Config, store
from launcher.config.checks import World
from launcher.config.cluster import SlurmConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir

AGAIN = ("SIGUSR2", "time limit")  # reasons to stop that Slurm had, and not a person


def main() -> None:
    try:
        if sys.argv[1] == "begin":
            with redirect_stdout(sys.stderr):  # the script reads the folder alone
                run = begin(sys.argv[2:])
            print(run.logs)
        else:
            sys.exit(end(RunDir.of_logs(Path(sys.argv[2]))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)


def begin(words: list[str]) -> RunDir:
    """The next attempt of the run that `words` name; the first one composes overrides."""
    if words[:1] == ["--run"]:
        run = sweep.element(Path(words[1]))
        config = _again(run)
    else:
        run, config = _composed(words)
    run, _ = run_dir.begin(run, config, sys.argv, World.of(config, 0).size)
    manifest.write_json(run.job, _circumstances())
    if config.strategy.on_disk:
        compiled.disk_access(run)
    return run


def end(run: RunDir) -> int:
    """The job's exit status. Work that Slurm stopped goes back into the queue, as often as the
    configuration allows and as long as every attempt gets further than the one before."""
    if sweep.is_sweep(run.path.parent):
        overview.summarise(run.path.parent, without=_job())
    if (newest := run.newest().attempt) > run.attempt:
        print(f"attempt {newest} of {run.path} has begun: this one is over", file=sys.stderr)
        return rank_log.FAILED
    if not run.status.is_file():
        failure = local.first_failure(run)
        print(local.report(run, failure), file=sys.stderr)
        return failure.exit_code if failure else rank_log.FAILED
    status = json.loads(run.status.read_text())
    if status["state"] == "finished" or status["reason"] not in AGAIN:
        return 0
    if why_not := _spent(run, status):
        print(f"not queued again: {why_not}", file=sys.stderr)
        return rank_log.STOPPED
    done = subprocess.run(["scontrol", "requeue", _job()], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"job {_job()} cannot be queued again: {done.stderr.strip()}", file=sys.stderr)
        print(f"go on: shardway resume {run.path}", file=sys.stderr)
        return rank_log.STOPPED
    return 0


def _job() -> str:
    """This job. An element of an array goes by its place there: the number of one of them is the
    whole array's, too, and `scontrol requeue` would take it for that."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _again(run: RunDir) -> Config:
    """A run's configuration; one that has a checkpoint goes on from its newest."""
    config = store.load(run.config)
    saved = bool(layout.finished(run.checkpoints))
    return dataclasses.replace(config, resume="auto" if saved else config.resume)


def _composed(overrides: list[str]) -> tuple[RunDir, Config]:
    """From overrides, on the job's first start; later ones find what was frozen then."""
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    sys.argv = [
        "shardway train",
        "cluster=slurm",
        f"cluster.nodes={nodes}",
        f"cluster.gpus_per_node={os.environ.get('SLURM_GPUS_ON_NODE', '0')}",
        f"run_dir=runs/slurm-{_job()}",
        *overrides,
    ]
    (config,) = train.compose()
    run = RunDir(Path(config.run_dir or "").absolute())
    if run.config.is_file() and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return run, _again(run)
    train.check(config)
    return run_dir.create(config), config


def _circumstances() -> dict[str, Any]:
    """Who this attempt is to Slurm, and until when."""
    return {
        "job": _job(),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": os.environ["SLURM_JOB_NODELIST"],
        "end": _end_time(_job()),
    }


def _end_time(job: str) -> float | None:
    """When the time limit comes, in seconds since 1970; None without a limit. (SLURM_JOB_END_TIME
    is not set by Slurm 22.)"""
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%e"], capture_output=True, text=True
    )
    try:
        return datetime.fromisoformat(done.stdout.strip()).timestamp()
    except ValueError:
        return None


def _spent(run: RunDir, status: dict[str, Any]) -> str | None:
    """Why a job that has work left does not go back into the queue."""
    cluster = store.load(run.config).cluster
    assert isinstance(cluster, SlurmConfig)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= cluster.requeue_limit:
        return f"cluster.requeue_limit={cluster.requeue_limit} is reached"
    before = RunDir(run.path, run.attempt - 1).status
    if before.is_file() and json.loads(before.read_text())["step"] >= status["step"]:
        return f"this attempt got no further than the one before it, step {status['step']}"
    return None


if __name__ == "__main__":
    main()
