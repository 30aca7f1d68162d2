"""Checks before a run starts: rules, data, and the checkpoint to resume from. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.cluster import devices
from launcher.cluster.gpus import visible_gpus
from launcher.config import Config, store
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.table import broken_rules
from launcher.config.schema.cluster import ClusterConfig
from launcher.data import source
from launcher.errors import REFUSED, UserError
from launcher.folders.checkpoint import Checkpoint
from launcher.folders.model import is_hub_id
from launcher.folders.run import RunDir
from launcher.run import resume, started_by


def check(config: Config) -> World:
    """Check `config` against the rules and its data files. Returns the ranks it will have.

    Raises ConfigError with all problems.
    """
    world = get_world(config)
    if problems := find_problems(config, world):
        raise store.ConfigError(problems)
    return world


def check_first_rows(config: Config) -> None:
    """Check the model, and render the first rows with the chat template, in a process of its own.

    For a run that will wait in a queue: other runs find a bad row within seconds. Nothing is
    downloaded and no model extended for this. Raises ConfigError if the ranks would refuse the
    model, or if the template refuses a row.
    """
    model = config.model
    if is_hub_id(model.name_or_path) or model.add_tokens:
        return
    with tempfile.TemporaryDirectory(prefix="shardway-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(store.dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "launcher.row_check", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == REFUSED:
        raise store.ConfigError([done.stdout.strip()])
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"the first rows could not be checked here: {reason}", file=sys.stderr)


def find_problems(config: Config, world: World) -> list[str]:
    """A message for every problem of `config` on `world`, its data included."""
    return [*find_problems_without_data(config, world), *source.find_problems(config.data)]


def find_problems_without_data(config: Config, world: World) -> list[str]:
    """Broken rules, and what prevents resuming from the checkpoint that `config` names."""
    return [*broken_rules(config, world), *_find_resume_problems(config)]


def _find_resume_problems(config: Config) -> list[str]:
    try:
        checkpoint = find_resume_checkpoint(config)
        return resume.find_problems(checkpoint, config) if checkpoint else []
    except UserError as error:
        return [str(error)]


def find_resume_checkpoint(config: Config) -> Checkpoint | None:
    """The checkpoint that a run will resume from if its files are intact, which the ranks check."""
    checkpoints = RunDir(Path(config.run_dir or "")).checkpoints
    candidates = resume.candidates(config.resume, checkpoints)
    return next((each for each in candidates if each.is_finished), None)


def get_world(config: Config) -> World:
    """The ranks that `config` asks for on this machine, or those that torchrun has started."""
    machine = inspect_machine(config)
    if not started_by.is_rank():
        return World.from_config(config, machine)
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    return World(int(os.environ["WORLD_SIZE"]) // per_node, per_node, machine, get_rank())


def inspect_machine(config: Config) -> Machine:
    """What is installed on this machine. Checks only what `config` needs."""
    return Machine(
        gpus=visible_gpus(),
        flash_attention=devices.has_flash_attention(),
        libaio=not config.strategy.on_disk or devices.has_libaio(),
        missing_trackers=devices.missing_packages(config.tracking.trackers),
        compiler=config.training.compile == "off" or devices.has_compiler(),
        liger=devices.has_liger(),
        triton_interpreter=devices.interprets_triton(),
    )


def refuse_other_launchers(cluster: ClusterConfig) -> None:
    """Raise UserError if this process would launch a run although another launcher has started it:
    as one task of several under srun, or it is not clear whether as a rank of torchrun."""
    reason, variable = started_by.why_no_rank(), started_by.RANK_VARIABLES[0]
    if reason is None:
        return
    if variable in os.environ and cluster.name != "slurm":
        raise UserError(
            f"{variable} is set as if torchrun had started this process, but {reason}: it is left "
            f"over from another launch → unset {variable}, or env -u {variable} shardway …"
        )
    task = os.environ.get("SLURM_PROCID", "0")
    if task != "0":
        raise UserError(
            f"SLURM_PROCID={task}: srun has started this command more than once, and each would "
            "start all ranks → srun --ntasks=1 …, or shardway train cluster=slurm without srun; "
            "if each is a run of its own: unset SLURM_PROCID"
        )


def get_rank() -> int:
    """The rank of this process, 0 if torchrun did not start it."""
    return int(os.environ["RANK"]) if started_by.is_rank() else 0
