"""Choose what is auto in a configuration where the command was typed. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from launcher.cluster import gpus, preflight
from launcher.config import Config
from launcher.config.rules.rule import World
from launcher.folders.model import is_hub_id
from launcher.folders.run import RunDir
from launcher.io.host_memory import usable_memory
from launcher.run import auto, resume, started_by
from launcher.run.auto import Choice, Device


def settle(config: Config) -> Choice:
    """`config` without auto, if the ranks will run on this machine. If not, or if it is not known
    what they will run on, it stays auto: the ranks choose (launcher/training/choices.py)."""
    is_here = config.cluster.name != "slurm" and not started_by.is_rank()
    if not (auto.is_open(config) and is_here):
        return Choice(config, [])
    world = preflight.get_world(config)
    devices = _devices(world)
    name = config.model.name_or_path
    if devices is None or is_hub_id(name):
        return Choice(config, [])
    resumed = resume.resumed_config(config, RunDir(Path(config.run_dir or "")))
    return auto.choose(config, devices, world, Path(name), resumed)


def _devices(world: World) -> list[Device] | None:
    """The devices of the ranks; None if the driver does not say what GPUs they are."""
    if world.gpus:
        return gpus.devices_of_ranks(world.nproc_per_node) or None
    if gpus.has_amd_driver():
        return None
    return [Device("CPU", False, False, usable_memory() // world.nproc_per_node)]
