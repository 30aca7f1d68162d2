"""What the batch script asks on a job's first node: begin an attempt, and end it. Imports no torch.

python -m launcher.job begin --run RUN | OVERRIDES…     prints RUN/logs/attempt-N
python -m launcher.job end RUN/logs/attempt-N           its status; back into the queue
"""

from __future__ import annotations

import dataclasses
import functools
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

# Reasons to stop that Slurm had, and not a person: USR2 is asked for by --signal; TERM comes first
# at a preemption where the site sends no other; `scancel JOB` ends the script, too.
AGAIN = ("SIGUSR2", "SIGTERM", "time limit")
ATTEMPTS_WITHOUT_PROGRESS = 3


def main() -> None:
    try:
        if sys.argv[1] == "begin":
            with redirect_stdout(sys.stderr):  # the script reads the folder alone
                run = begin(sys.argv[2:])
            print(run.logs if run else "")
        else:
            sys.exit(end(RunDir.of_logs(Path(sys.argv[2]))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)


def begin(words: list[str]) -> RunDir | None:
    """The next attempt of the run that `words` name; the first one composes overrides. None where
    a person has stopped it since it was queued."""
    if words[:1] == ["--run"]:
        run = sweep.element(Path(words[1]), _fact("ArrayTaskId"))
        config = _again(run)
    else:
        run, config = _composed(words)
    if _stopped_by_a_person(run):
        print(f"{run.path} was stopped while it waited")
        return None
    run, _ = run_dir.begin(run, config, sys.argv, World.of(config, 0).size)
    manifest.write_json(run.job, {**_circumstances(), "step": _saved(run)})
    if config.strategy.on_disk:
        compiled.disk_access(run)
    return run


def end(run: RunDir) -> int:
    """The job's exit status. Work that Slurm stopped goes back into the queue, as often as the
    configuration allows and as long as the attempts get further."""
    status, again = _verdict(run)
    if sweep.is_sweep(run.path.parent):
        try:
            overview.summarise(run.path.parent, without=_job())
        except (UserError, OSError) as error:
            print(f"no new {sweep.SUMMARY}: {error}", file=sys.stderr)
    if not again:
        return status
    done = subprocess.run(["scontrol", "requeue", _job()], capture_output=True, text=True)
    if done.returncode == 0:
        return 0
    print(f"job {_job()} cannot be queued again: {done.stderr.strip()}", file=sys.stderr)
    print(f"go on: shardway resume {run.path}", file=sys.stderr)
    return rank_log.STOPPED


def _verdict(run: RunDir) -> tuple[int, bool]:
    """(exit status, whether the job is to be queued again)."""
    if (newest := run.newest().attempt) > run.attempt:
        print(f"attempt {newest} of {run.path} has begun: this one is over", file=sys.stderr)
        return rank_log.FAILED, False
    if run.status.is_file():
        status = json.loads(run.status.read_text())
        again = status["state"] == "stopped" and status["reason"] in AGAIN
        otherwise = 0
    else:
        failure = local.first_failure(run)
        print(local.report(run, failure), file=sys.stderr)
        again = local.lost_a_node(run, World.of(store.load(run.config), 0).size)
        otherwise = failure.exit_code if failure else rank_log.FAILED
    if not again or _stopped_by_a_person(run):
        return otherwise, False
    if why_not := _spent(run):
        print(f"not queued again: {why_not}", file=sys.stderr)
        return otherwise or rank_log.STOPPED, False
    return 0, True


def _job() -> str:
    """This job. An element of an array goes by its place there: the number of one of them is the
    whole array's, too, and `scontrol requeue` would take it for that."""
    array, index = _fact("ArrayJobId"), _fact("ArrayTaskId")
    return f"{array}_{index}" if array and index else os.environ["SLURM_JOB_ID"]


def _fact(key: str) -> str | None:
    """What Slurm says of this job. Not its variables: of a job that was submitted by another they
    may be the other's."""
    return _facts().get(key)


@functools.cache
def _facts() -> dict[str, str]:
    job = os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    # Of an array there may be a line for each element.
    mine = [line for line in done.stdout.splitlines() if line.startswith(f"JobId={job} ")]
    if done.returncode != 0 or not mine:
        raise UserError(f"scontrol show job {job}: {done.stderr.strip() or done.stdout.strip()}")
    return dict(word.split("=", 1) for word in mine[0].split() if "=" in word)


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
    configs = train.compose()
    config, run = configs[0], RunDir(Path(configs[0].run_dir or "").absolute())
    if run.config.is_file() and int(_fact("Restarts") or 0):
        return run, _again(run)
    cluster = config.cluster
    assert isinstance(cluster, SlurmConfig)
    written = cluster.setup or cluster.environment or cluster.container or cluster.container_python
    if len(configs) > 1 or config.launch.dry_run or written:
        raise UserError(
            "sbatch is one run with what stands in the script: --multirun, launch.dry_run, "
            "cluster.setup, cluster.environment and cluster.container belong to "
            "shardway train cluster=slurm …"
        )
    train.check(config)
    return run_dir.folder(config), config


def _circumstances() -> dict[str, Any]:
    """Who this attempt is to Slurm, and until when."""
    return {
        "job": _job(),
        "restarts": int(_fact("Restarts") or 0),
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


def _spent(run: RunDir) -> str | None:
    """Why a job that has work left does not go back into the queue."""
    cluster = store.load(run.config).cluster
    assert isinstance(cluster, SlurmConfig)
    if int(_fact("Restarts") or 0) >= cluster.requeue_limit:
        return f"cluster.requeue_limit={cluster.requeue_limit} is reached"
    files = [RunDir(run.path, number).job for number in range(1, run.attempt + 1)]
    begun = [json.loads(file.read_text())["step"] for file in files if file.is_file()]
    if len(begun) >= ATTEMPTS_WITHOUT_PROGRESS:
        saved = _saved(run)
        if saved <= begun[-ATTEMPTS_WITHOUT_PROGRESS]:
            return f"{ATTEMPTS_WITHOUT_PROGRESS} attempts in a row got no further than step {saved}"
    return None


def _saved(run: RunDir) -> int:
    """The step of the newest checkpoint, 0 without one."""
    found = layout.finished(run.checkpoints)
    return found[0].step if found else 0


def _stopped_by_a_person(run: RunDir) -> bool:
    """Whether RUN/stop is there, and not written by a rank that Slurm has told to stop. It is
    answered by this: the file goes."""
    if not run.stop.is_file() or run.stop.read_text(encoding="utf-8").strip() in AGAIN:
        return False
    run.stop.unlink()
    return True


if __name__ == "__main__":
    main()
