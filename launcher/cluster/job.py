"""The part of the batch script that runs on a job's first node: start an attempt, and end it.

python -m launcher.cluster.job begin --run RUN | OVERRIDES…     prints RUN/logs/attempt-N
python -m launcher.cluster.job end RUN/logs/attempt-N           requeues the job, or its status, or
                                                                GO_ON if another attempt follows

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import datetime
from pathlib import Path

from launcher.cluster import build_ops, local, preflight, restarts, runs_table
from launcher.cluster.node import has_absent_node
from launcher.cluster.slurm_command import run_slurm
from launcher.config import Config, store
from launcher.config.compose import compose_command_line
from launcher.config.rules.rule import Machine, World
from launcher.config.schema.cluster import SlurmConfig
from launcher.config.secrets import secret_values
from launcher.errors import BAD_NODE, FAILED, HUNG, STOPPED, UserError, exit_when_refused
from launcher.folders import manifest
from launcher.folders.checkpoint import finished_checkpoints
from launcher.folders.json_file import COUNT, TEXT, or_null, read_fields, read_object
from launcher.folders.run import RunDir
from launcher.run import create, ended, sweep

# Reasons to stop that come from Slurm and not from a person. USR2 is the signal that --signal asks
# for. TERM comes first in a preemption if the site sends no other signal; `scancel JOB` sends it
# too, but also ends the batch script.
REQUEUE_REASONS = ("SIGUSR2", "SIGTERM", "time limit")
ATTEMPTS_WITHOUT_PROGRESS = 3
GO_ON = 85  # the status of `end` with which the batch script begins another attempt
USAGE = """\
python -m launcher.cluster.job begin --run RUN | OVERRIDES…
python -m launcher.cluster.job end RUN/logs/attempt-N"""


def main() -> None:
    with exit_when_refused(), _exit_when_disk_fails():
        match sys.argv[1:]:
            case ["begin", *arguments] if "SLURM_JOB_ID" in os.environ and arguments != ["--run"]:
                with redirect_stdout(sys.stderr):  # the script reads only the folder from stdout
                    run = start_attempt(arguments)
                print(run.logs if run else "")
            case ["end", logs] if "SLURM_JOB_ID" in os.environ:
                sys.exit(end_attempt(RunDir.from_logs(Path(logs))))
            case _:
                raise UserError(f"usage, in the batch script of a job:\n{USAGE}")


@contextmanager
def _exit_when_disk_fails() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # such as a full disk
        print(f"{error.filename or 'the run folder'}: {error.strerror}", file=sys.stderr)
        sys.exit(FAILED)


def start_attempt(arguments: list[str]) -> RunDir | None:
    """Start the next attempt of the run that the script's `arguments` name. The first attempt
    composes overrides.

    None if a person has stopped the run since it was queued, or if nothing is left to train.
    """
    if arguments[:1] == ["--run"]:
        run = sweep.run_of_task(Path(arguments[1]), _job_field("ArrayTaskId"))
        config = _config_to_resume(run)
    else:
        run, config = _compose_run(arguments)
    if _take_stop_by_person(run):
        run.starting.unlink(missing_ok=True)
        print(f"{run.path} was stopped while it waited in the queue")
        return None
    if done := ended.nothing_to_do(config):
        run.starting.unlink(missing_ok=True)
        print(done)
        return None
    world_size = World.from_config(config, Machine()).size
    run, _ = create.start_attempt_in(run, config, sys.argv, world_size, _job_id())
    manifest.write_json(run.job, {**_job_record(), "step": _newest_saved_step(run)})
    if config.strategy.on_disk:
        build_ops.build_async_io(run)
    return run


def end_attempt(run: RunDir) -> int:
    """The job's exit status, or GO_ON. A run that Slurm stopped is queued again, as often as the
    configuration allows and while its attempts make progress."""
    status, requeue = _outcome(run)
    if sweep.is_sweep(run.path.parent):
        try:
            runs_table.write_summary(run.path.parent, without=_job_id())
        except (UserError, OSError) as error:
            print(f"{sweep.SUMMARY} was not updated: {error}", file=sys.stderr)
    if not requeue:
        return status
    try:
        run_slurm(["scontrol", "requeue", _job_id()])
        return 0
    except UserError as error:
        print(f"job {_job_id()} cannot be queued again: {error}", file=sys.stderr)
        print(f"to resume it: shardway resume {run.path}", file=sys.stderr)
        return STOPPED


def _outcome(run: RunDir) -> tuple[int, bool]:
    """(exit status, whether to queue the job again)."""
    if (newest := run.newest_attempt().attempt) > run.attempt:
        print(f"attempt {newest} of {run.path} has started: this one is over", file=sys.stderr)
        return FAILED, False
    if run.status.is_file():
        # A damaged file ends the job: requeueing it might go on for ever.
        status = read_fields(run.status, state=TEXT, reason=or_null(TEXT))
        hung = status["state"] == "hung"
        requeue = status["state"] == "stopped" and status["reason"] in REQUEUE_REASONS
        requeue = requeue or (hung and _requeues_hung(run))
        exit_code = HUNG if hung else 0
        if hung and not requeue and _goes_on(run):
            return GO_ON, False
    else:
        failure = local.first_failure(run)
        print(local.describe_failure(run, failure), file=sys.stderr)
        world = World.from_config(store.load(run.config), Machine())
        requeue = local.lost_a_node(run, world.size)
        exit_code = failure.exit_code if failure else FAILED
        if (requeue or failure is None) and has_absent_node(run, world.nodes):
            print("a node has not begun: its own message is above", file=sys.stderr)
            return BAD_NODE, False
        if not requeue and _goes_on(run):
            return GO_ON, False
    if not requeue or _take_stop_by_person(run):
        return exit_code, False
    if why_not := _reason_not_to_requeue(run):
        print(f"not queued again: {why_not}", file=sys.stderr)
        return exit_code or STOPPED, False
    return 0, True


def _goes_on(run: RunDir) -> bool:
    """Whether another attempt follows this one, which has failed, in the same job."""
    this = _job_id(), int(_job_field("Restarts") or 0)
    earlier = [number for number in range(1, run.attempt) if _began(run, number) == this]
    limit = store.load(run.config).cluster.max_restarts
    why_not = restarts.reason_to_end(run, limit, earlier)
    if not limit or _take_stop_by_person(run):
        return False
    print(f"not restarted: {why_not}" if why_not else "restarting in the same job", file=sys.stderr)
    return why_not is None


def _began(run: RunDir, attempt: int) -> tuple[str, int] | None:
    """The job of an attempt, and how often it had been requeued; None if that is not known."""
    file = RunDir(run.path, attempt).job
    if not file.is_file():
        return None
    record = read_object(file)
    return str(record.get("job")), int(record.get("restarts") or 0)


def _requeues_hung(run: RunDir) -> bool:
    cluster = store.load(run.config).cluster
    return isinstance(cluster, SlurmConfig) and cluster.requeue_hung


def _job_id() -> str:
    """This job. A task of an array is ARRAY_INDEX: one of the tasks has the job number of the
    array, and `scontrol requeue` would take that number for the whole array."""
    array, index = _job_field("ArrayJobId"), _job_field("ArrayTaskId")
    return f"{array}_{index}" if array and index else os.environ["SLURM_JOB_ID"]


def _job_field(key: str) -> str | None:
    """A field of this job in Slurm. Environment variables are not reliable: a job that another job
    submitted may have that job's."""
    return _job_fields().get(key)


@functools.cache
def _job_fields() -> dict[str, str]:
    job = os.environ["SLURM_JOB_ID"]
    answer = run_slurm(["scontrol", "show", "job", "-o", job])
    # For an array there may be one line per task.
    lines = [line for line in answer.splitlines() if line.startswith(f"JobId={job} ")]
    if not lines:
        raise UserError(f"scontrol show job {job}: {answer.strip()}")
    # Free texts may look like fields. The job's name comes before these, comment and folder behind.
    line = re.sub(r" JobName=.*? UserId=", " UserId=", lines[0])
    return dict(word.split("=", 1) for word in reversed(line.split()) if "=" in word)


def _config_to_resume(run: RunDir) -> Config:
    """A run's frozen configuration, set to resume from the newest checkpoint if there is one."""
    config = store.load(run.config)
    _check_secrets(config)
    has_checkpoint = bool(finished_checkpoints(run.checkpoints))
    return dataclasses.replace(config, resume="auto" if has_checkpoint else config.resume)


def _check_secrets(config: Config) -> None:
    """Raise UserError with the names of secrets that have not reached this job."""
    if isinstance(config.cluster, SlurmConfig):
        secret_values(config.cluster)


def _compose_run(overrides: list[str]) -> tuple[RunDir, Config]:
    """Compose overrides on the job's first start; later starts load what was frozen then."""
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    sys.argv = [
        "shardway train",
        "cluster=slurm",
        f"cluster.nodes={nodes}",
        f"cluster.gpus_per_node={os.environ.get('SLURM_GPUS_ON_NODE', '0')}",
        f"run_dir=runs/slurm-{_job_id()}",
        *overrides,
    ]
    configs = compose_command_line()
    config, run = configs[0], RunDir(Path(configs[0].run_dir or "").absolute())
    if run.has_config and int(_job_field("Restarts") or 0):
        return run, _config_to_resume(run)
    cluster = config.cluster
    assert isinstance(cluster, SlurmConfig)
    changes_script = (
        cluster.setup or cluster.environment or cluster.container or cluster.container_python
    )
    if len(configs) > 1 or config.launch.dry_run or changes_script:
        raise UserError(
            "sbatch submits one run with the script as it is: --multirun, launch.dry_run, "
            "cluster.setup, cluster.environment and cluster.container work only with "
            "shardway train cluster=slurm …"
        )
    preflight.check(config)
    _check_secrets(config)
    return create.find_or_create_folder(config), config


def _job_record() -> dict[str, object]:
    """This attempt's job, nodes and end time, for job.json."""
    return {
        "job": _job_id(),
        "restarts": int(_job_field("Restarts") or 0),
        "nodes": os.environ["SLURM_JOB_NODELIST"],
        "end": _end_time(_job_id()),
    }


def _end_time(job: str) -> float | None:
    """When the time limit ends the job, in seconds since 1970; None without a limit.

    Slurm 22 does not set SLURM_JOB_END_TIME.
    """
    try:
        answer = run_slurm(["squeue", "--noheader", f"--jobs={job}", "--format=%e"])
        return datetime.fromisoformat(answer.strip()).timestamp()
    except ValueError:  # no limit, or no answer
        return None


def _reason_not_to_requeue(run: RunDir) -> str | None:
    """Why an unfinished job is not queued again; None if it is."""
    cluster = store.load(run.config).cluster
    assert isinstance(cluster, SlurmConfig)
    if int(_job_field("Restarts") or 0) >= cluster.requeue_limit:
        return f"cluster.requeue_limit={cluster.requeue_limit} is reached"
    files = [RunDir(run.path, number).job for number in range(1, run.attempt + 1)]
    first_steps = [read_fields(file, step=COUNT)["step"] for file in files if file.is_file()]
    if len(first_steps) >= ATTEMPTS_WITHOUT_PROGRESS:
        saved = _newest_saved_step(run)
        if saved <= first_steps[-ATTEMPTS_WITHOUT_PROGRESS]:
            return f"{ATTEMPTS_WITHOUT_PROGRESS} attempts in a row got no further than step {saved}"
    return None


def _newest_saved_step(run: RunDir) -> int:
    """The step of the newest checkpoint, 0 without one."""
    checkpoints = finished_checkpoints(run.checkpoints)
    return checkpoints[0].step if checkpoints else 0


def _take_stop_by_person(run: RunDir) -> bool:
    """Whether RUN/stop exists and is from a person, not from a rank that Slurm has signaled. If so,
    the file is deleted: the request is fulfilled."""
    if not run.stop.is_file() or run.stop.read_text(encoding="utf-8").strip() in REQUEUE_REASONS:
        return False
    run.stop.unlink()
    return True


if __name__ == "__main__":
    main()
