"""Plans a run: a dry run in a process of its own. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster import preflight
from launcher.cluster.gpus import visible_gpus
from launcher.config import Config, store
from launcher.config.rules.data import DATA_RULES
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.schedule import SCHEDULE_RULES
from launcher.config.rules.slurm import SLURM_RULES
from launcher.config.rules.table import RULES as ALL_RULES
from launcher.config.rules.table import broken_rules
from launcher.config.rules.tracking import TRACKING_RULES
from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.folders.model import model_folder
from launcher.io import open_files
from launcher.memory import MemoryUsage
from launcher.memory.target import ANY_GPU, CPU_PROCESSES, Target
from launcher.memory.tracers import ENVIRONMENT
from launcher.run import auto
from launcher.run.auto import Choice, Device

# A plan needs neither rows nor weights, and does not depend on when the run evaluates or saves, nor
# on who starts it.
IGNORED_TABLES = (*DATA_RULES, *SCHEDULE_RULES, *SLURM_RULES, *TRACKING_RULES)
IGNORED_RULES = {"model-has-safetensors", "chat-has-a-template", "length-of-training"}
IGNORED_RULES |= {"head-is-there", "tied-head-is-the-embedding", "one-machine"}
IGNORED_RULES |= {"stop-before-the-end", "auto-names-a-run", "run-dir-is-new"}
IGNORED_RULES |= {rule.id for rule in IGNORED_TABLES}
RULES = tuple(rule for rule in ALL_RULES if rule.id not in IGNORED_RULES)
# If less than this share of a GPU's memory is free, what a plan does not count may not fit.
TIGHT = 0.05


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What there is, in bytes; None: unknown."""

    gpu: int | None = None  # of one GPU
    host: int | None = None  # of one machine

    def fits(self, peak: int, host_peak: int) -> bool | None:
        """Whether a GPU has room for `peak` and a machine for `host_peak`; None if the memory of a
        GPU is unknown."""
        if self.host is not None and host_peak > self.host:
            return False
        return None if self.gpu is None else peak <= self.gpu

    def verdict(self, peak: int, host_peak: int) -> str:
        """`fits`, `tight` or `does not fit`; empty if the memory of a GPU is unknown."""
        fits = self.fits(peak, host_peak)
        if not fits or self.gpu is None:
            return "" if fits is None else "does not fit"
        return "tight" if self.gpu - peak < TIGHT * self.gpu else "fits"


@dataclass(frozen=True, kw_only=True)
class PlannedRun(MemoryUsage):
    """A run, and the memory of the rank that needs most."""

    label: str  # the settings in which it differs from the other runs; empty for a single run
    ranks: int
    target: str  # the devices of the ranks, in words
    notes: list[str]
    memory: int | None  # of a GPU, or a rank's share of the host's, in bytes
    on_cpu: bool = False
    host_memory: int | None = None  # of a machine, in bytes
    ranks_per_machine: int = 1
    open_files: int = 0  # of a rank, sockets included

    @property
    def host_peak(self) -> int:
        """Bytes that all ranks of a machine need in host memory: to load, or to train and save."""
        on_cpu = self.peak if self.on_cpu else 0
        training = self.ranks_per_machine * (on_cpu + self.host + self.staging) + self.gathering
        return max(self.ranks_per_machine * self.loading, training)

    @property
    def fits(self) -> bool | None:
        """Whether GPU and host memory suffice; None if the memory of a GPU is unknown."""
        return self._available.fits(self.peak, self.host_peak)

    @property
    def verdict(self) -> str:
        """`fits`, `tight` or `does not fit`; empty if the memory of a GPU is unknown."""
        return self._available.verdict(self.peak, self.host_peak)

    @property
    def _available(self) -> Memory:
        return Memory(gpu=self.memory, host=self.host_memory)

    def to_dict(self) -> dict[str, Any]:
        """The content of --json."""
        return {**dataclasses.asdict(self), "host_peak": self.host_peak, "fits": self.fits}


def plan_run(config: Config, label: str = "", target: Target = ANY_GPU) -> PlannedRun:
    """Plan a run, in a separate process. Raises UserError if it cannot be planned."""
    world, notes = plannable_world(config, target)
    device = target.of_rank(world)
    choice = _choose(config, world, device)
    if problems := broken_rules(choice.config, world, RULES):
        raise store.ConfigError(choice.explain(problems))
    plannable, changes = make_plannable(choice.config)
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_text(store.dump(plannable), encoding="utf-8")
        arguments = [str(file), str(world.nodes), str(world.nproc_per_node)]
        done = subprocess.run(
            [sys.executable, "-m", "launcher.memory.dry_run", *arguments],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise UserError(
            f"{done.stderr}\nplanning failed with status {done.returncode} because of the error "
            "above: fake tensors do not support every operation"
        )
    sizes = batch_notes(config, [setting.partition("=")[0] for setting in label.split()])
    result = json.loads(done.stdout.splitlines()[-1])
    if "refused" in result:
        raise UserError(result["refused"])
    return PlannedRun(
        label=label,
        ranks=world.size,
        ranks_per_machine=world.nproc_per_node,
        open_files=open_files.needed(world.size, groups=2 if config.checkpoint.async_save else 1),
        target=target.describe(world),
        notes=[*sizes, *choice.lines, *changes, *notes, *filter(None, [result["warning"]])],
        memory=device.memory,
        on_cpu=not device.is_gpu,
        host_memory=target.host,
        **result,
    )


def batch_notes(config: Config, left_out: Collection[str]) -> list[str]:
    """A note about the length of the rows and the batch that a plan is for, without the settings
    `left_out`, which the plan shows elsewhere."""
    training = config.training
    sizes = {
        "data.max_length": config.data.max_length,
        "training.micro_batch_size": training.micro_batch_size,
        "training.global_batch_size": training.global_batch_size,
    }
    said = [f"{key}={size}" for key, size in sizes.items() if key not in left_out]
    return [f"planned with {' '.join(said)}"] if said else []


def _choose(config: Config, world: World, device: Device) -> Choice:
    """`config` without auto, if every rank has such a device."""
    if not auto.is_open(config):
        return Choice(config, [])
    source = config.model
    folder = model_folder(source.name_or_path, source.revision, patterns=("config.json",))
    return auto.choose(config, [device] * world.size, world, folder, resumed=None)


def plannable_world(config: Config, target: Target = ANY_GPU) -> tuple[World, list[str]]:
    """The ranks of `config`, as if this machine had a GPU for each of them unless they run on CPU,
    and notes."""
    if not target.device.is_gpu:
        return World.from_config(config, preflight.inspect_machine(config)), []
    machine = Machine(gpus=visible_gpus(), flash_attention=True, liger=True)
    world = World.from_config(config, machine)
    notes = []
    is_counted = config.cluster.nproc_per_node is None and config.strategy.name != "single"
    if is_counted and not world.gpus:
        notes.append(
            f"the number of ranks is {CPU_PROCESSES}={world.nproc_per_node}, because there are no "
            "GPUs to count → cluster.nproc_per_node=8"
        )
    machine = dataclasses.replace(world.machine, gpus=world.nproc_per_node)
    return dataclasses.replace(world, machine=machine), notes


def make_plannable(config: Config) -> tuple[Config, list[str]]:
    """`config` without what fake tensors do not support, and notes about the changes. Raises
    UserError if nothing can replace it."""
    if config.strategy.on_disk:
        raise UserError("parameters on a disk cannot be planned → strategy.offload_param=cpu")
    if config.optimizer.name == "adamw_paged":
        raise UserError("the pages of optimizer=adamw_paged cannot be planned → optimizer=adamw")
    training, model = config.training, config.model
    substitutes: dict[str, Any] = {}
    if training.compile != "off":
        substitutes["compile"] = "off"
    if training.kernels != "torch":
        substitutes["kernels"] = "torch"
    if training.loss == "liger":
        substitutes["loss"] = "chunked"
    notes = [f"planned with training.{key}={value}" for key, value in substitutes.items()]
    if model.attention not in ("sdpa", "eager"):
        notes.append(f"planned with model.attention=sdpa, not {model.attention}")
        model = dataclasses.replace(model, attention="sdpa")
    method = config.method
    if isinstance(method, LoraConfig) and method.merge_first:
        # The same number of weights, with other values.
        method = dataclasses.replace(method, merge_first=[])
    training = dataclasses.replace(training, **substitutes)
    return dataclasses.replace(config, training=training, model=model, method=method), notes
