"""The submit side of Slurm: what sbatch is told, and whether it takes it. Imports no torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import manifest, paths, run_dir
from launcher.config import Config
from launcher.config.cluster import SlurmConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir

SCRIPT, SETUP = "train.sbatch", "setup.sh"


def launch(config: Config, cluster: SlurmConfig) -> int:
    """Queue a run, new or begun, and print what a person needs next.

    Raises UserError with Slurm's reason, before anything is written, where it would never start.
    """
    new = config.resume != "auto" or not (Path(config.run_dir or "") / "config.yaml").is_file()
    _ask(["sbatch", "--test-only", *flags(cluster), str(script())])
    run = run_dir.create(config) if new else RunDir(Path(config.run_dir or "").absolute())
    run_dir.freeze(run, config)
    print(f"run folder: {run.path}", flush=True)
    return submit(run, cluster)


def submit(run: RunDir, cluster: SlurmConfig) -> int:
    """Queue what is frozen in the folder of `run`."""
    manifest.write_text(run.path / SETUP, setup(cluster))
    manifest.write_text(run.path / SCRIPT, script().read_text(encoding="utf-8"))
    command = sbatch(cluster, run.path)
    answer = _ask([command[0], "--parsable", *command[1:]])
    job = answer.strip().splitlines()[-1].partition(";")[0]
    manifest.write_json(run.submitted, {"job": job, "command": command})
    print(f"job {job} is in the queue")
    for verb, words in (
        ("follow", "logs RUN --follow"),
        ("stop", "stop RUN"),
        ("go on", "resume RUN"),
    ):
        print(f"{verb + ':':<8} shardway {words.replace('RUN', shlex.quote(str(run.path)))}")
    return 0


@dataclass(frozen=True)
class Queued:
    """A job as squeue has it."""

    state: str
    nodes: str  # or, while it waits, why


def job_of(run: RunDir) -> str | None:
    """The number of the job that `run` was queued as last, None where it never was."""
    if not run.submitted.is_file():
        return None
    return str(json.loads(run.submitted.read_text(encoding="utf-8"))["job"])


def queue(jobs: list[str]) -> dict[str, Queued]:
    """Those of `jobs` that wait or run, by number. Raises UserError where Slurm does not answer."""
    if not jobs:
        return {}
    lines = _ask(["squeue", "--me", "--noheader", "--format=%A %T %R"]).splitlines()
    found = {
        job: Queued(state, nodes) for job, state, nodes in (line.split(None, 2) for line in lines)
    }
    return {job: found[job] for job in jobs if job in found}


def cancel(job: str) -> None:
    _ask(["scancel", job])


def show(cluster: SlurmConfig, where: Path) -> None:
    """What would be submitted."""
    print(f"# {SETUP}\n{setup(cluster)}")
    print(f"# {SCRIPT}\n{script().read_text(encoding='utf-8')}")
    print(f"# {shlex.join(sbatch(cluster, where))}")


def script() -> Path:
    return paths.beside("slurm") / SCRIPT


def sbatch(cluster: SlurmConfig, run: Path) -> list[str]:
    """The command that queues `run`."""
    own = [f"--output={run / 'logs' / 'slurm-%j.out'}", f"--chdir={run}"]
    return ["sbatch", *flags(cluster), *own, str(run / SCRIPT), "--run", str(run)]


def flags(cluster: SlurmConfig) -> list[str]:
    """Options of sbatch: each word one argument, never through a shell."""
    named = ["partition", "account", "qos", "time", "mem", "constraint", "reservation", "exclude"]
    named += ["nodelist", "dependency", "comment"]
    values: dict[str, object] = {
        "job-name": cluster.job_name,
        "nodes": cluster.nodes,
        **{key: getattr(cluster, key) for key in named},
        "gpus-per-node": _gpus(cluster),
        "cpus-per-task": cluster.cpus_per_task,
        "mail-user": cluster.mail_user,
        "mail-type": cluster.mail_type,
        "signal": f"USR2@{cluster.signal_seconds}",
        "kill-on-invalid-dep": "yes" if cluster.dependency else None,
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
    if cluster.container:
        lines.append(f"container=({shlex.join(cluster.container)})")
    return "\n".join(lines) + "\n"


def _gpus(cluster: SlurmConfig) -> str | None:
    if cluster.gpus_per_node == 0:
        return None
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    return f"{kind}{cluster.gpus_per_node}"


def _ask(command: list[str]) -> str:
    """Slurm's answer. Raises UserError with its reason."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"cluster=slurm: there is no {command[0]} on this machine; run on a login node, or "
            "with cluster=local"
        ) from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise UserError(f"Slurm would not do this: {said}\n{shlex.join(command)}")
    return done.stdout
