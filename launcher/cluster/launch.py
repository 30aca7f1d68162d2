"""Start a checked configuration, on this machine or in Slurm's queue. Imports no torch."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from launcher.cluster import build_ops, command, local, numa, restarts, runs_table, slurm
from launcher.cluster.preflight import find_resume_checkpoint, refuse_other_launchers
from launcher.config import deepspeed, store
from launcher.config.rules.rule import World
from launcher.config.schema.cluster import SlurmConfig
from launcher.config.schema.strategy import ZeroConfig
from launcher.errors import STOPPED
from launcher.folders import versions
from launcher.folders.run import RunDir
from launcher.run import create, ended, resume, sweep
from launcher.run.auto import Choice
from launcher.run.rank_log import say

# Exit statuses of a run that a person has stopped.
STOPPED_BY_USER = (STOPPED, *(128 + number for number in local.SIGNALS))


def print_dry_run(choices: list[Choice], worlds: list[World]) -> None:
    """Print what would run. Writes nothing."""
    for choice, world in zip(choices, worlds, strict=True):
        config = choice.config
        run_dir = Path(config.run_dir or "runs/<time>")
        print(store.dump(config))
        for line in choice.lines:
            print(f"# {line}")
        ranks, machines = _counted(world.size, "rank"), _counted(world.nodes, "machine")
        print(f"# {ranks} on {machines}, {_counted(world.gpus, 'GPU')} visible")
        if isinstance(config.strategy, ZeroConfig):
            engine = deepspeed.engine_config(
                config.strategy, config.training, config.precision, world.size
            )
            print(f"# deepspeed.json\n{json.dumps(engine, indent=2)}")
        if checkpoint := find_resume_checkpoint(config):
            print(f"# resume: from {checkpoint.path}, if its files are whole")
        if not isinstance(config.cluster, SlurmConfig):
            mode = numa.numa_mode(config.cluster, world.nproc_per_node, world.gpus)
            attempt = RunDir(run_dir.absolute()).newest_attempt().attempt + 1
            torchrun = command.torchrun_command(run_dir, attempt, world.nproc_per_node, mode)
            print(f"# {shlex.join(torchrun)}")
    if isinstance(config.cluster, SlurmConfig):
        folder = run_dir if len(choices) == 1 else run_dir.parent
        slurm.print_dry_run(config.cluster, folder, len(choices))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def launch(choice: Choice, world: World) -> int:
    """Freeze the configuration in a run folder and start the run. Returns its exit status when it
    has ended, or 0 when it is in Slurm's queue or has nothing left to train.

    Raises UserError if the run cannot start.
    """
    config = choice.config
    refuse_other_launchers(config.cluster)
    if done := ended.nothing_to_do(config):
        print(done)
        return 0
    if mismatch := versions.describe_mismatch():
        print(mismatch, file=sys.stderr)
    checkpoint = find_resume_checkpoint(config)
    if isinstance(config.cluster, SlurmConfig):
        return slurm.launch(config, config.cluster)
    numa_mode = numa.numa_mode(config.cluster, world.nproc_per_node, world.gpus)
    run, frozen = create.start_attempt(config, sys.argv, world.size)
    say(run, "\n".join([f"run folder: {run.path}", *choice.lines]))
    if checkpoint:
        changed = resume.compare_configs(checkpoint.config, frozen)
        lines = [*changed.allowed, *changed.breaking]
        name = checkpoint.path.name
        say(run, "\n  ".join([f"resume: from {name}, if its files are whole", *lines]))
    if config.strategy.on_disk:
        build_ops.build_async_io(run)
    say(run, f"starting {_counted(world.size, 'rank')}; importing torch comes first")

    def start(attempt: RunDir) -> int:
        return local.launch(attempt, world.nproc_per_node, world.gpus, numa_mode)

    return restarts.run_attempts(run, frozen, world.size, start)


def launch_sweep(choices: list[Choice], worlds: list[World]) -> int:
    """Launch the runs one after another on this machine, or as a job array. Returns the exit status
    of the first run that failed.

    The other runs still start if one fails. Stopping one run stops the sweep.
    """
    configs = [choice.config for choice in choices]
    refuse_other_launchers(configs[0].cluster)
    cluster, first_failed = configs[0].cluster, 0
    if isinstance(cluster, SlurmConfig):
        return slurm.launch_sweep(configs, cluster)
    folder = sweep.create_folder(configs)
    for choice, world in zip(choices, worlds, strict=True):
        status = launch(choice, world)
        first_failed = first_failed or status
        if status in STOPPED_BY_USER:
            break
    print(f"\nsweep: {folder}\n{runs_table.write_summary(folder)}", end="")
    return first_failed
