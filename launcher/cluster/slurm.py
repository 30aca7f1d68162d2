"""The submit side of Slurm: what sbatch is told, and whether it takes it. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import manifest, paths, run_dir, sweep
from launcher.config import Config
from launcher.config.cluster import SlurmConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir

SCRIPT, SETUP = "train.sbatch", "setup.sh"
QUEUE_SECONDS = 30.0  # for an answer of squeue: who looks again and again must not pile up


def launch(config: Config, cluster: SlurmConfig) -> int:
    """Queue a run, new or begun, and print what a person needs next.

    Raises UserError with Slurm's reason, before anything is written, where it would never start.
    """
    _refuse_when_queued([config])
    _ask(["sbatch", "--test-only", *flags(cluster), str(script())])
    run = _frozen(config)
    return submit(run.path, [run], cluster)


def launch_sweep(configs: list[Config], cluster: SlurmConfig) -> int:
    """Queue the runs of a sweep, as `sweep.place` put them, as one job array."""
    _refuse_when_queued(configs)
    _ask(["sbatch", "--test-only", *flags(cluster, len(configs)), str(script())])
    folder = sweep.begin(configs)
    return submit(folder, [_frozen(config) for config in configs], cluster)


def submit(folder: Path, runs: list[RunDir], cluster: SlurmConfig) -> int:
    """Queue what is frozen: the run in `folder`, or those of the sweep there."""
    print(f"run folder: {folder}", flush=True)
    manifest.write_text(folder / SETUP, setup(cluster))
    manifest.write_text(folder / SCRIPT, script().read_text(encoding="utf-8"))
    for run in runs:
        run.stop.unlink(missing_ok=True)  # meant for an attempt before
    command = sbatch(cluster, folder, len(runs))
    answer = _ask([command[0], "--parsable", *command[1:]])
    job = answer.strip().splitlines()[-1].partition(";")[0]
    for at, run in enumerate(runs):
        mine = job if len(runs) == 1 else f"{job}_{at}"
        manifest.write_json(run.submitted, {"job": mine, "command": command})
    array = "" if len(runs) == 1 else f", an array of {len(runs)}"
    print(f"job {job} is in the queue{array}")
    named, first = shlex.quote(str(folder)), shlex.quote(str(runs[0].path))
    print(f"look:    shardway runs {named}" if array else f"go on:   shardway resume {named}")
    print(f"follow:  shardway logs {first} --follow\nstop:    shardway stop {named}")
    return 0


def _refuse_when_queued(configs: list[Config]) -> None:
    """One run is one job at a time."""
    runs = [RunDir(Path(config.run_dir)) for config in configs if config.run_dir]
    jobs = {job: run for run in runs if run.config.is_file() and (job := job_of(run))}
    for job in queue(list(jobs)):
        raise UserError(
            f"{jobs[job].path} is job {job} already; stop it first: shardway stop {jobs[job].path}"
        )


def _frozen(config: Config) -> RunDir:
    """The folder of a run, made unless it goes on in one, with its configuration."""
    run = run_dir.folder(config)
    run_dir.freeze(run, config)
    return run


@dataclass(frozen=True)
class Queued:
    """A job as squeue has it."""

    state: str
    nodes: str  # or, while it waits, why


def job_of(run: RunDir) -> str | None:
    """The number of the job that `run` was queued as last, by whatever door; None where it never
    was."""
    for file in (run.submitted, run.newest().job):
        if file.is_file():
            return str(json.loads(file.read_text(encoding="utf-8"))["job"])
    return None


def queue(jobs: list[str]) -> dict[str, Queued]:
    """Those of `jobs` that wait or run, by number. Raises UserError where Slurm does not answer."""
    if not jobs:
        return {}
    words = ["squeue", f"--jobs={','.join(jobs)}", "--array", "--noheader", "--format=%i|%T|%R"]
    answer = _ask(words, unless="Invalid job id", seconds=QUEUE_SECONDS)
    lines = (line.split("|", 2) for line in answer.splitlines())
    found = {job: Queued(state, nodes) for job, state, nodes in lines}
    return {job: found[job] for job in jobs if job in found}


def cancel_waiting(job: str) -> None:
    """Take `job` out of the queue if it waits there. One that has begun goes on."""
    _ask(["scancel", "--state=PENDING", job])


def cancel(job: str) -> None:
    _ask(["scancel", job])


def show(cluster: SlurmConfig, where: Path, runs: int) -> None:
    """What would be submitted."""
    print(f"# {SETUP}\n{setup(cluster)}")
    print(f"# {SCRIPT}\n{script().read_text(encoding='utf-8')}")
    print(f"# {shlex.join(sbatch(cluster, where, runs))}")


def script() -> Path:
    return paths.beside("slurm") / SCRIPT


def sbatch(cluster: SlurmConfig, folder: Path, runs: int = 1) -> list[str]:
    """The command that queues the run in `folder`, or the `runs` of the sweep there."""
    log = "logs/slurm-%j.out" if runs == 1 else "%a/logs/slurm-%A_%a.out"
    own = [f"--output={folder / log}", f"--chdir={folder}"]
    return ["sbatch", *flags(cluster, runs), *own, str(folder / SCRIPT), "--run", str(folder)]


def flags(cluster: SlurmConfig, runs: int = 1) -> list[str]:
    """Options of sbatch: each word one argument, never through a shell."""
    at_once = f"%{cluster.array_limit}" if cluster.array_limit else ""
    named = ["partition", "account", "qos", "time", "mem", "constraint", "reservation", "exclude"]
    named += ["nodelist", "dependency", "comment"]
    values: dict[str, object] = {
        "job-name": cluster.job_name,
        "nodes": cluster.nodes,
        **{key: getattr(cluster, key) for key in named},
        cluster.gpu_flag: _gpus(cluster),
        "cpus-per-task": cluster.cpus_per_task,
        "mail-user": cluster.mail_user,
        "mail-type": cluster.mail_type,
        "signal": f"USR2@{cluster.signal_seconds}",
        "kill-on-invalid-dep": "yes" if cluster.dependency else None,
        "array": f"0-{runs - 1}{at_once}" if runs > 1 else None,
    }
    given = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return [*given, *(["--exclusive"] if cluster.exclusive else []), *cluster.extra_flags]


def setup(cluster: SlurmConfig) -> str:
    """What the script runs before anything else, in bash; every value quoted."""
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


def _gpus(cluster: SlurmConfig) -> str | None:
    """[gpu:][TYPE:]NUMBER, for --gpus-per-node or --gres; None where no GPU is asked for."""
    if cluster.gpus_per_node == 0:
        return None
    parts = ["gpu"] if cluster.gpu_flag == "gres" else []
    parts += [cluster.gpu_type] if cluster.gpu_type else []
    return ":".join([*parts, str(cluster.gpus_per_node)])


def _ask(command: list[str], unless: str | None = None, seconds: float | None = None) -> str:
    """Slurm's answer; empty where it fails with the words `unless`. Raises UserError with its
    reason, and after `seconds`."""
    # A job that is submitted by another gets its variables, which Slurm sets anew for some only.
    values = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("SLURM_ARRAY_") and key != "SLURM_RESTART_COUNT"
    }
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=values, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"Slurm has not answered within {seconds:.0f} s: {shlex.join(command)}"
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"cluster=slurm: there is no {command[0]} on this machine; run on a login node, or "
            "with cluster=local"
        ) from error
    if done.returncode != 0 and unless and unless in done.stderr:
        return ""
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise UserError(f"Slurm would not do this: {said}\n{shlex.join(command)}")
    return done.stdout
