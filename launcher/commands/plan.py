"""`shardway plan`: how much memory a run will need, before it is queued and without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.gpus import gpu_memory, visible_devices, visible_gpus
from launcher.commands.arguments import UNITS, command_parser, parse_size
from launcher.config import Config, store
from launcher.config.compose import compose_command_line
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
from launcher.memory import MemoryUsage
from launcher.run import auto, sweep
from launcher.run.auto import Choice, Device

ABOUT = """\
Show how much memory the fullest rank of a run will need. Takes the overrides of `shardway train`.
The training code runs two steps on tensors without memory. This needs no GPU and no weights, only
the model's config.json. All rows have the length data.max_length.

    shardway plan model.name_or_path=meta-llama/Llama-3.1-8B method=lora cluster.nproc_per_node=8
    shardway plan --memory 80GB method=full strategy=fsdp cluster.nproc_per_node=4
    shardway plan --memory 80GB --multirun strategy=ddp,fsdp,zero3 training.micro_batch_size=1,4

The last command plans every combination, and prints one line of a table for each. The exit status
is 1 if a run does not fit into --memory, and 2 if a run cannot be planned. What is counted:
docs/memory.md
"""
# A plan needs neither rows nor weights, and does not depend on when the run evaluates or saves.
IGNORED_TABLES = (*DATA_RULES, *SCHEDULE_RULES, *SLURM_RULES, *TRACKING_RULES)
IGNORED_RULES = {"model-has-safetensors", "chat-has-a-template", "length-of-training"}
IGNORED_RULES |= {"head-is-there", "tied-head-is-the-embedding"}
IGNORED_RULES |= {"stop-before-the-end", "auto-names-a-run", "run-dir-is-new"}
IGNORED_RULES |= {rule.id for rule in IGNORED_TABLES}
RULES = tuple(rule for rule in ALL_RULES if rule.id not in IGNORED_RULES)
BAR_WIDTH = 40
# If less than this share of a GPU's memory is free, what a plan does not count may not fit.
TIGHT = 0.05


@dataclass(frozen=True, kw_only=True)
class PlannedRun(MemoryUsage):
    """A run, and the memory of the rank that needs most."""

    label: str  # the settings in which it differs from the other runs; empty for a single run
    ranks: int
    notes: list[str]
    memory: int | None  # of a GPU, in bytes

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits into a GPU; None if its memory is unknown."""
        return None if self.memory is None else self.peak <= self.memory

    @property
    def verdict(self) -> str:
        """`fits`, `tight` or `does not fit`; empty if the memory of a GPU is unknown."""
        if self.memory is None:
            return ""
        free = self.memory - self.peak
        return "does not fit" if free < 0 else "tight" if free < TIGHT * self.memory else "fits"

    def to_dict(self) -> dict[str, Any]:
        """The content of --json."""
        return {**dataclasses.asdict(self), "fits": self.fits}


def main() -> None:
    """Exits with 1 if a run does not fit, and with 2 if one cannot be planned."""
    options, overrides = _parser().parse_known_args()
    sys.argv = [sys.argv[0], *["--multirun"] * options.multirun, *overrides]
    memory = gpu_memory()
    if options.memory is not None:
        memory = parse_size(options.memory, "--memory")
    plans, errors = plan_each(compose_command_line(), memory)
    if options.json and plans:
        results = [planned.to_dict() for planned in plans]
        print(json.dumps(results if options.multirun else results[0], indent=2))
    elif plans:
        print(format_table(plans) if options.multirun else format_plan(plans[0]), flush=True)
    if errors:
        raise UserError("\n".join(errors))
    sys.exit(1 if any(planned.fits is False for planned in plans) else 0)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", ABOUT, "%(prog)s [options] [OVERRIDE ...]")
    parser.add_argument(
        "--memory", metavar="SIZE", help="of a GPU, such as 80GB; default: this machine's first GPU"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers of bytes as JSON")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="plan every combination of strategy=a,b …"
    )
    return parser


def plan_each(configs: list[Config], memory: int | None) -> tuple[list[PlannedRun], list[str]]:
    """The plans, and an error message for each run that cannot be planned."""
    labels = [
        " ".join(f"{key}={value}" for key, value in settings.items())
        for settings in sweep.differing_settings([dataclasses.asdict(config) for config in configs])
    ]
    plans, errors = [], []
    for label, config in zip(labels, configs, strict=True):
        if sys.stderr.isatty():
            print(f"planning {label or 'two steps'} …", file=sys.stderr, flush=True)
        try:
            plans.append(plan_run(config, label, memory))
        except UserError as error:
            errors.append(f"{label}: {error}" if label else str(error))
    return plans, errors


def plan_run(config: Config, label: str = "", memory: int | None = None) -> PlannedRun:
    """Plan a run, in a separate process. Raises UserError if it cannot be planned."""
    machine = Machine(gpus=visible_gpus(), flash_attention=True, liger=True)
    this_world = World.from_config(config, machine)
    # As if this machine had a GPU for each rank.
    machine = dataclasses.replace(this_world.machine, gpus=this_world.nproc_per_node)
    world = dataclasses.replace(this_world, machine=machine)
    choice = _choose(config, world, memory)
    if problems := broken_rules(choice.config, world, RULES):
        raise store.ConfigError(problems)
    plannable, notes = _make_plannable(choice.config)
    notes = [*choice.lines, *notes]
    if config.cluster.nproc_per_node is None and not this_world.gpus:
        notes.append(
            f"planned for {world.size} rank(s), because this machine has no GPUs to count "
            "→ cluster.nproc_per_node=8"
        )
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_text(store.dump(plannable), encoding="utf-8")
        arguments = [str(file), str(world.nodes), str(world.nproc_per_node)]
        done = subprocess.run(
            [sys.executable, "-m", "launcher.memory.dry_run", *arguments],
            # Fake tensors are on the CPU, even if the machine has a GPU.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise UserError(
            f"{done.stderr}\nplanning failed with status {done.returncode} because of the error "
            "above: fake tensors do not support every operation"
        )
    result = json.loads(done.stdout.splitlines()[-1])
    if "refused" in result:
        raise UserError(result["refused"])
    return PlannedRun(label=label, ranks=world.size, notes=notes, memory=memory, **result)


def _choose(config: Config, world: World, memory: int | None) -> Choice:
    """`config` without auto, as on GPUs like this machine's first one, or like an A100."""
    if not auto.is_open(config):
        return Choice(config, [])
    gpu = (*visible_devices(), Device("a GPU since Ampere", True, True, None))[0]
    devices = [dataclasses.replace(gpu, memory=memory)] * world.size
    source = config.model
    folder = model_folder(source.name_or_path, source.revision, patterns=("config.json",))
    return auto.choose(config, devices, world, folder, resumed=None)


def _make_plannable(config: Config) -> tuple[Config, list[str]]:
    """`config` without what fake tensors do not support, and notes about the changes. Raises
    UserError if there is no substitute."""
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
        method = dataclasses.replace(
            method, merge_first=[]
        )  # the same number of weights, with other values
    training = dataclasses.replace(training, **substitutes)
    return dataclasses.replace(config, training=training, model=model, method=method), notes


def format_plan(planned: PlannedRun) -> str:
    """The memory of one run, as lines with bars."""
    rows = [
        ("weights, masters, buffers", planned.weights),
        ("optimizer state", planned.optimizer),
        ("kept for backward", planned.activations),
        (f"peak, in the {planned.phase}", planned.peak),
    ]
    if planned.host:
        rows.append(("in host memory", planned.host))
    unit, scale = _choose_unit([planned]), max(planned.peak, planned.memory or 0, planned.host)
    head = f"the fullest of {planned.ranks} rank(s)"
    lines = [f"{head:<38}{unit}"]
    for name, size in rows:
        bar = "#" * round(BAR_WIDTH * size / scale)
        lines.append(f"  {name:<28} {size / UNITS[unit]:9,.2f}  {bar}".rstrip())
    return "\n".join([*lines, *planned.notes, *advice(planned)])


def _choose_unit(plans: list[PlannedRun]) -> str:
    """A unit that is small enough for all peaks."""
    return "GB" if min(planned.peak for planned in plans) >= UNITS["GB"] else "MB"


def advice(planned: PlannedRun) -> Iterator[str]:
    """Lines about whether the run fits, by how much, and what reduces its memory."""
    if planned.memory is None:
        yield "this machine has no GPU to compare with → --memory 80GB"
        return
    unit = _choose_unit([planned])
    free, memory = planned.memory - planned.peak, f"{planned.memory / UNITS[unit]:,.2f} {unit}"
    difference = f"{abs(free) / UNITS[unit]:,.2f} {unit}"
    if free < 0:
        yield f"{planned.verdict} into {memory}: {difference} too much"
        yield "what helps: more ranks under strategy=fsdp or zero3, training.micro_batch_size=1,"
        yield "training.activation_checkpointing=full, method=lora or qlora; docs/memory.md"
    else:
        rest = f"{difference} of {memory} are left"
        yield f"{planned.verdict}: {rest} for CUDA itself and fragmentation"


def format_table(plans: list[PlannedRun]) -> str:
    """One line for each run, and the notes of all runs."""
    columns = ["ranks", "weights", "optimizer", "kept", "peak", "host"]
    width, unit = max(22, *(len(planned.label) for planned in plans)), _choose_unit(plans)
    lines = [f"{f'{unit} of the fullest rank':<{width}}  {'  '.join(columns)}"]
    for planned in plans:
        sizes = (
            planned.weights, planned.optimizer, planned.activations, planned.peak, planned.host
        )  # fmt: skip
        cells = [str(planned.ranks), *(f"{size / UNITS[unit]:,.2f}" for size in sizes)]
        row = "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, columns, strict=True))
        lines.append(f"{planned.label:<{width}}  {row}  {planned.verdict}".rstrip())
    notes = dict.fromkeys(note for planned in plans for note in planned.notes)
    return "\n".join([*lines, *notes])
