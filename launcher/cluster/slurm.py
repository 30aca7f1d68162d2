"""Submit runs to Slurm: check with sbatch, freeze, submit. Imports no torch."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from launcher.cluster.slurm_command import run_slurm
from launcher.cluster.slurm_queue import query_queue
from launcher.config import Config
from launcher.config.schema.cluster import SlurmConfig
from launcher.config.secrets import secret_names, secret_values
from launcher.errors import UserError
from launcher.folders import manifest, paths
from launcher.folders.run import RunDir
from launcher.run import create, sweep
from launcher.run.status import known_job_id

SCRIPT, SETUP = "train.sbatch", "setup.sh"
FLAG_FIELDS = (  # fields of SlurmConfig that are flags of sbatch with the same name
    *("partition", "account", "qos", "time", "mem", "mem_per_cpu", "mem_per_gpu", "constraint"),
    *("reservation", "exclude", "nodelist", "dependency", "comment"),
)


def launch(config: Config, cluster: SlurmConfig) -> int:
    """Queue a run, new or resumed, and print the commands that a person needs next. Returns 0.

    Raises UserError with Slurm's reason, before anything is written, if the job could never start.
    """
    _refuse_if_queued([config])
    refuse_impossible(cluster, Path(config.run_dir or "runs"))
    run = _freeze_run(config)
    return submit(run.path, [run], cluster)


def launch_sweep(configs: list[Config], cluster: SlurmConfig) -> int:
    """Queue the runs of a sweep as one job array. `sweep.assign_run_dirs` has set their folders."""
    _refuse_if_queued(configs)
    refuse_impossible(cluster, Path(configs[0].run_dir or "runs"), len(configs))
    folder = sweep.create_folder(configs)
    return submit(folder, [_freeze_run(config) for config in configs], cluster)


def refuse_impossible(cluster: SlurmConfig, folder: Path, runs: int = 1) -> None:
    """Raise UserError, before anything is written, if a job for `folder` could never start."""
    sbatch_command(cluster, folder.absolute(), runs)
    secret_values(cluster)
    run_slurm(["sbatch", "--test-only", *sbatch_flags(cluster, runs), str(script_path())])


def submit(folder: Path, runs: list[RunDir], cluster: SlurmConfig) -> int:
    """Queue frozen runs: the run in `folder`, or those of the sweep there. Returns 0."""
    print(f"run folder: {folder}", flush=True)
    manifest.write_text(folder / SETUP, setup_script(cluster), private=True)
    manifest.write_text(folder / SCRIPT, script_path().read_text(encoding="utf-8"))
    for run in runs:
        run.stop.unlink(missing_ok=True)  # it was meant for a previous attempt
    command = sbatch_command(cluster, folder, len(runs))
    # They reach the job, and the next start of a job that is queued again, by --export=ALL.
    secrets = secret_values(cluster)
    answer = run_slurm([command[0], "--parsable", *command[1:]], variables=secrets)
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
    jobs = {job: run for run in runs if run.has_config and (job := known_job_id(run))}
    for job in query_queue(list(jobs)):
        run = jobs[job]
        raise UserError(f"{run.path} is job {job} already; stop it first: shardway stop {run.path}")


def _freeze_run(config: Config) -> RunDir:
    """Find or create the folder of a run, and freeze its configuration there."""
    run = create.find_or_create_folder(config)
    create.freeze_config(run, config)
    return run


def print_dry_run(cluster: SlurmConfig, folder: Path, runs: int) -> None:
    """Print the scripts and the command that would be submitted."""
    print(f"# {SETUP}\n{setup_script(cluster)}")
    print(f"# {SCRIPT}\n{script_path().read_text(encoding='utf-8')}")
    print(f"# {shlex.join(sbatch_command(cluster, folder, runs))}")


def script_path() -> Path:
    """The batch script of this installation."""
    return paths.resource("slurm") / SCRIPT


def sbatch_command(cluster: SlurmConfig, folder: Path, runs: int = 1) -> list[str]:
    """The command that queues the run in `folder`, or the `runs` of the sweep there.

    Raises UserError for a folder in which Slurm cannot write the job's log.
    """
    if bad := re.search(r"[\\\x00-\x1f]", str(folder)):
        raise UserError(
            f"run_dir={str(folder)!r} contains {bad[0]!r}, and Slurm could not write the job's log "
            "there → another run_dir, or another working folder"
        )
    log = "logs/slurm-%j.out" if runs == 1 else "%a/logs/slurm-%A_%a.out"
    # In names of logs, Slurm replaces what follows a percent sign.
    own_flags = [f"--output={str(folder).replace('%', '%%')}/{log}", f"--chdir={folder}"]
    script = [str(folder / SCRIPT), "--run", str(folder)]
    return ["sbatch", *sbatch_flags(cluster, runs), *own_flags, *script]


def sbatch_flags(cluster: SlurmConfig, runs: int = 1) -> list[str]:
    """Flags of sbatch. Each is one argument and never goes through a shell."""
    at_once = f"%{cluster.array_limit}" if cluster.array_limit else ""
    values: dict[str, object] = {
        "job-name": cluster.job_name,
        "nodes": cluster.nodes,
        **{key.replace("_", "-"): getattr(cluster, key) for key in FLAG_FIELDS},
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
    """The bash lines that the batch script runs first. Every value is quoted; secrets are not among
    them."""
    secrets = secret_names(cluster)
    plain = {key: value for key, value in cluster.environment.items() if key not in secrets}
    lines = [
        f"export SHARDWAY_PYTHON={shlex.quote(sys.executable)}",
        *(f"export {key}={shlex.quote(value)}" for key, value in plain.items()),
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
