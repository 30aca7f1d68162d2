"""Submit runs to Slurm: check with sbatch, freeze, submit, query the queue. Imports no torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from launcher.config import Config
from launcher.config.schema.cluster import SlurmConfig
from launcher.errors import UserError
from launcher.folders import manifest, paths
from launcher.folders.run import RunDir
from launcher.run import create, sweep
from launcher.run.status import QueuedJob, known_job_id

SCRIPT, SETUP = "train.sbatch", "setup.sh"
QUEUE_SECONDS = 30.0  # timeout of squeue: repeated queries must not accumulate
FLAG_FIELDS = (  # fields of SlurmConfig that are flags of sbatch with the same name
    *("partition", "account", "qos", "time", "mem", "constraint", "reservation", "exclude"),
    *("nodelist", "dependency", "comment"),
)


def launch(config: Config, cluster: SlurmConfig) -> int:
    """Queue a run, new or resumed, and print the commands that a person needs next. Returns 0.

    Raises UserError with Slurm's reason, before anything is written, if the job could never start.
    """
    _refuse_if_queued([config])
    _run_slurm(["sbatch", "--test-only", *sbatch_flags(cluster), str(script_path())])
    run = _freeze_run(config)
    return submit(run.path, [run], cluster)


def launch_sweep(configs: list[Config], cluster: SlurmConfig) -> int:
    """Queue the runs of a sweep as one job array. `sweep.assign_run_dirs` has set their folders."""
    _refuse_if_queued(configs)
    _run_slurm(["sbatch", "--test-only", *sbatch_flags(cluster, len(configs)), str(script_path())])
    folder = sweep.create_folder(configs)
    return submit(folder, [_freeze_run(config) for config in configs], cluster)


def submit(folder: Path, runs: list[RunDir], cluster: SlurmConfig) -> int:
    """Queue frozen runs: the run in `folder`, or those of the sweep there. Returns 0."""
    print(f"run folder: {folder}", flush=True)
    manifest.write_text(folder / SETUP, setup_script(cluster))
    manifest.write_text(folder / SCRIPT, script_path().read_text(encoding="utf-8"))
    for run in runs:
        run.stop.unlink(missing_ok=True)  # it was meant for a previous attempt
    command = sbatch_command(cluster, folder, len(runs))
    answer = _run_slurm([command[0], "--parsable", *command[1:]])
    job = answer.strip().splitlines()[-1].partition(";")[0]
    for index, run in enumerate(runs):
        run_job = job if len(runs) == 1 else f"{job}_{index}"
        manifest.write_json(run.submitted, {"job": run_job, "command": command})
    array = "" if len(runs) == 1 else f", an array of {len(runs)}"
    print(f"job {job} is in the queue{array}")
    quoted_folder, first_run = shlex.quote(str(folder)), shlex.quote(str(runs[0].path))
    if array:
        print(f"status: shardway runs {quoted_folder}")
    else:
        print(f"resume: shardway resume {quoted_folder}")
    print(f"follow: shardway logs {first_run} --follow\nstop:   shardway stop {quoted_folder}")
    return 0


def _refuse_if_queued(configs: list[Config]) -> None:
    """A run can have only one job at a time."""
    runs = [RunDir(Path(config.run_dir)) for config in configs if config.run_dir]
    jobs = {job: run for run in runs if run.config.is_file() and (job := known_job_id(run))}
    for job in query_queue(list(jobs)):
        run = jobs[job]
        raise UserError(f"{run.path} is job {job} already; stop it first: shardway stop {run.path}")


def _freeze_run(config: Config) -> RunDir:
    """Find or create the folder of a run, and freeze its configuration there."""
    run = create.find_or_create_folder(config)
    create.freeze_config(run, config)
    return run


def query_queue(jobs: list[str]) -> dict[str, QueuedJob]:
    """Job number → state, for those of `jobs` that wait or run. Raises UserError if Slurm does not
    answer."""
    if not jobs:
        return {}
    command = ["squeue", f"--jobs={','.join(jobs)}", "--array", "--noheader", "--format=%i|%T|%R"]
    answer = _run_slurm(command, allowed_error="Invalid job id", seconds=QUEUE_SECONDS)
    lines = (line.split("|", 2) for line in answer.splitlines())
    listed = {job: QueuedJob(state, nodes) for job, state, nodes in lines}
    return {job: listed[job] for job in jobs if job in listed}


def cancel_waiting(job: str) -> None:
    """Remove `job` from the queue if it still waits. A job that has started continues."""
    _run_slurm(["scancel", "--state=PENDING", job])


def cancel(job: str) -> None:
    """Cancel `job`, whether it waits or runs."""
    _run_slurm(["scancel", job])


def print_dry_run(cluster: SlurmConfig, folder: Path, runs: int) -> None:
    """Print the scripts and the command that would be submitted."""
    print(f"# {SETUP}\n{setup_script(cluster)}")
    print(f"# {SCRIPT}\n{script_path().read_text(encoding='utf-8')}")
    print(f"# {shlex.join(sbatch_command(cluster, folder, runs))}")


def script_path() -> Path:
    """The batch script of this installation."""
    return paths.resource("slurm") / SCRIPT


def sbatch_command(cluster: SlurmConfig, folder: Path, runs: int = 1) -> list[str]:
    """The command that queues the run in `folder`, or the `runs` of the sweep there."""
    log = "logs/slurm-%j.out" if runs == 1 else "%a/logs/slurm-%A_%a.out"
    own_flags = [f"--output={folder / log}", f"--chdir={folder}"]
    script = [str(folder / SCRIPT), "--run", str(folder)]
    return ["sbatch", *sbatch_flags(cluster, runs), *own_flags, *script]


def sbatch_flags(cluster: SlurmConfig, runs: int = 1) -> list[str]:
    """Flags of sbatch. Each is one argument and never goes through a shell."""
    at_once = f"%{cluster.array_limit}" if cluster.array_limit else ""
    values: dict[str, object] = {
        "job-name": cluster.job_name,
        "nodes": cluster.nodes,
        **{key: getattr(cluster, key) for key in FLAG_FIELDS},
        cluster.gpu_flag: _gpu_request(cluster),
        "cpus-per-task": cluster.cpus_per_task,
        "mail-user": cluster.mail_user,
        "mail-type": cluster.mail_type,
        "signal": f"USR2@{cluster.signal_seconds}",
        "kill-on-invalid-dep": "yes" if cluster.dependency else None,
        "array": f"0-{runs - 1}{at_once}" if runs > 1 else None,
    }
    flags = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return [*flags, *(["--exclusive"] if cluster.exclusive else []), *cluster.extra_flags]


def setup_script(cluster: SlurmConfig) -> str:
    """The bash lines that the batch script runs first. Every value is quoted."""
    lines = [
        f"export SHARDWAY_PYTHON={shlex.quote(sys.executable)}",
        *(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items()),
        *cluster.setup,
    ]
    if cluster.container_python:
        lines.append(f"export SHARDWAY_RANK_PYTHON={shlex.quote(cluster.container_python)}")
    if cluster.container:
        lines.append(f"container=({shlex.join(cluster.container)})")
    return "\n".join(lines) + "\n"


def _gpu_request(cluster: SlurmConfig) -> str | None:
    """[gpu:][TYPE:]NUMBER, for --gpus-per-node or --gres; None if no GPU is requested."""
    if cluster.gpus_per_node == 0:
        return None
    parts = ["gpu"] if cluster.gpu_flag == "gres" else []
    parts += [cluster.gpu_type] if cluster.gpu_type else []
    return ":".join([*parts, str(cluster.gpus_per_node)])


def _run_slurm(
    command: list[str], allowed_error: str | None = None, seconds: float | None = None
) -> str:
    """Run a command of Slurm and return its output, or "" if it fails with `allowed_error` in its
    message. Raises UserError with Slurm's reason, or if it takes more than `seconds`."""
    # A job that another job submits inherits its variables, and Slurm overwrites only some of them.
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("SLURM_ARRAY_") and key != "SLURM_RESTART_COUNT"
    }
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"Slurm has not answered within {seconds:.0f} s: {shlex.join(command)}"
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"cluster=slurm: there is no {command[0]} on this machine; use a login node, or "
            "cluster=local"
        ) from error
    if result.returncode != 0 and allowed_error and allowed_error in result.stderr:
        return ""
    if result.returncode != 0:
        status = f"exit status {result.returncode}"
        reason = result.stderr.strip() or result.stdout.strip() or status
        raise UserError(f"Slurm refused the command: {reason}\n{shlex.join(command)}")
    return result.stdout
