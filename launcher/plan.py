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

from launcher import sweep, train
from launcher.cluster.devices import gpu_memory, visible_gpus
from launcher.config import Config, checks, store
from launcher.config.data_rules import DATA_RULES
from launcher.config.method import LoraConfig
from launcher.config.rule import World
from launcher.config.schedule_rules import SCHEDULE_RULES
from launcher.config.slurm_rules import SLURM_RULES
from launcher.config.tracking_rules import TRACKING_RULES
from launcher.errors import UserError
from launcher.memory import Bytes
from launcher.sizes import UNITS, parse_size

ABOUT = """\
Say how much memory the fullest rank of a run will need. Takes the overrides of `shardway train`.
Two steps of the run are done on tensors without memory, by the code that trains: no GPU and no
weights are needed, only the model's config.json. Rows are taken as long as data.max_length.

    shardway plan model.name_or_path=meta-llama/Llama-3.1-8B method=lora cluster.nproc_per_node=8
    shardway plan --memory 80GB method=full strategy=fsdp cluster.nproc_per_node=4
    shardway plan --memory 80GB --multirun strategy=ddp,fsdp,zero3 training.micro_batch_size=1,4

The last one plans each combination, a line of a table each. Ends with 1 where something does not
fit into --memory, with 2 where something cannot be planned. What is counted: docs/memory.md
"""
# Neither rows nor weights are needed, and it does not matter when things happen.
UNNEEDED_TABLES = (*DATA_RULES, *SCHEDULE_RULES, *SLURM_RULES, *TRACKING_RULES)
UNNEEDED = {"model-has-safetensors", "chat-has-a-template", "length-of-training"}
UNNEEDED |= {"stop-before-the-end", "auto-names-a-run", "run-dir-is-new"}
UNNEEDED |= {rule.id for rule in UNNEEDED_TABLES}
RULES = tuple(rule for rule in checks.RULES if rule.id not in UNNEEDED)
WIDTH = 40  # of the bars
TIGHT = 0.05  # of a GPU's memory: less than that left may not be enough for what is not counted


@dataclass(frozen=True, kw_only=True)
class Planned(Bytes):
    """A run, and what the fullest of its ranks needs."""

    label: str
    ranks: int
    notes: list[str]
    memory: int | None  # of a GPU, in bytes

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak <= self.memory

    @property
    def verdict(self) -> str:
        """In a word or two; empty where there is nothing to compare with."""
        if self.memory is None:
            return ""
        left = self.memory - self.peak
        return "does not fit" if left < 0 else "tight" if left < TIGHT * self.memory else "fits"

    def told(self) -> dict[str, Any]:
        """For --json."""
        return {**dataclasses.asdict(self), "fits": self.fits}


def main() -> None:
    """The command line. Exits with 1 where a run does not fit, 2 where one cannot be planned."""
    options, overrides = _parser().parse_known_args()
    sys.argv = [sys.argv[0], *["--multirun"] * options.multirun, *overrides]
    try:
        given = options.memory
        memory = gpu_memory() if given is None else parse_size(given, "--memory")
        plans, refused = plan_each(train.compose(), memory)
    except UserError as error:
        plans, refused = [], [str(error)]
    if options.json and plans:
        told = [each.told() for each in plans]
        print(json.dumps(told if options.multirun else told[0], indent=2))
    elif plans:
        print(table(plans) if options.multirun else page(plans[0]), flush=True)
    print(*refused, sep="\n", end="\n" if refused else "", file=sys.stderr)
    if refused:
        sys.exit(train.UNUSABLE_CONFIGURATION)
    sys.exit(1 if any(each.fits is False for each in plans) else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway plan",
        usage="%(prog)s [options] [OVERRIDE ...]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--memory", metavar="SIZE", help="of a GPU (80GB); that of this machine's")
    parser.add_argument("--json", action="store_true", help="bytes, for programs")
    parser.add_argument("--multirun", "-m", action="store_true", help="plan each of strategy=a,b")
    return parser


def plan_each(configs: list[Config], memory: int | None) -> tuple[list[Planned], list[str]]:
    """The plans, and a sentence for each run that cannot be planned: the others still are."""
    labels = [
        " ".join(f"{key}={value}" for key, value in apart.items())
        for apart in sweep.differing(configs)
    ]
    plans, refused = [], []
    for label, config in zip(labels, configs, strict=True):
        if sys.stderr.isatty():
            print(f"planning {label or 'two steps'} …", file=sys.stderr, flush=True)
        try:
            plans.append(plan(config, label, memory))
        except UserError as error:
            refused.append(f"{label}: {error}" if label else str(error))
    return plans, refused


def plan(config: Config, label: str = "", memory: int | None = None) -> Planned:
    """Plan a run in a process of its own. Raises UserError for one that cannot be."""
    here = World.of(config, visible_gpus(), flash_attention=True, liger=True)
    world = dataclasses.replace(here, gpus=here.nproc_per_node)  # as if there were one for each
    if problems := checks.broken_rules(config, world, RULES):
        raise store.ConfigError(problems)
    simpler, notes = _simpler(config)
    if config.cluster.nproc_per_node is None and not here.gpus:
        notes.append(
            f"planned for {world.size} rank(s), there is no GPU here to count "
            "→ cluster.nproc_per_node=8"
        )
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        frozen = Path(scratch) / "config.yaml"
        frozen.write_text(store.dump(simpler), encoding="utf-8")
        words = [frozen, world.nodes, world.nproc_per_node]
        done = subprocess.run(
            [sys.executable, "-m", "launcher.memory.trial", *map(str, words)],
            # Fake tensors are on the CPU, also where there is a GPU.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise UserError(
            f"{done.stderr}\nplanning failed with status {done.returncode}, by what stands above: "
            "fake tensors cannot do everything"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise UserError(found["refused"])
    return Planned(label=label, ranks=world.size, notes=notes, memory=memory, **found)


def _simpler(config: Config) -> tuple[Config, list[str]]:
    """`config` without what fake tensors cannot do, and what was changed."""
    if config.strategy.on_disk:
        raise UserError("parameters on a disk cannot be planned → strategy.offload_param=cpu")
    if config.optimizer.name == "adamw_paged":
        raise UserError("pages come and go and cannot be planned → optimizer=adamw")
    training, model = config.training, config.model
    other: dict[str, Any] = {}
    if training.compile != "off":
        other["compile"] = "off"
    if training.kernels != "torch":
        other["kernels"] = "torch"
    if training.loss == "liger":
        other["loss"] = "chunked"
    notes = [f"planned with training.{key}={value}" for key, value in other.items()]
    if model.attention not in ("sdpa", "eager"):
        notes.append(f"planned with model.attention=sdpa, not {model.attention}")
        model = dataclasses.replace(model, attention="sdpa")
    method = config.method
    if isinstance(method, LoraConfig) and method.merge_first:
        method = dataclasses.replace(method, merge_first=[])  # as many weights, with other values
    training = dataclasses.replace(training, **other)
    return dataclasses.replace(config, training=training, model=model, method=method), notes


def page(planned: Planned) -> str:
    """What one run needs, for reading."""
    rows = [
        ("weights, masters, buffers", planned.weights),
        ("optimizer state", planned.optimizer),
        ("kept for backward", planned.activations),
        (f"peak, in the {planned.phase}", planned.peak),
    ]
    if planned.host:
        rows.append(("in host memory", planned.host))
    unit, scale = _unit([planned]), max(planned.peak, planned.memory or 0, planned.host)
    head = f"the fullest of {planned.ranks} rank(s)"
    lines = [f"{head:<38}{unit}"]
    for what, size in rows:
        bar = "#" * round(WIDTH * size / scale)
        lines.append(f"  {what:<28} {size / UNITS[unit]:9,.2f}  {bar}".rstrip())
    return "\n".join([*lines, *planned.notes, *advice(planned)])


def _unit(plans: list[Planned]) -> str:
    """In which all of them can be told apart."""
    return "GB" if min(each.peak for each in plans) >= UNITS["GB"] else "MB"


def advice(planned: Planned) -> Iterator[str]:
    """Whether it fits, by how much, and what helps."""
    if planned.memory is None:
        yield "no GPU here to compare it with → --memory 80GB"
        return
    unit = _unit([planned])
    left, whole = planned.memory - planned.peak, f"{planned.memory / UNITS[unit]:,.2f} {unit}"
    apart = f"{abs(left) / UNITS[unit]:,.2f} {unit}"
    if left < 0:
        yield f"{planned.verdict} into {whole}: {apart} too much"
        yield "what helps: more ranks under strategy=fsdp or zero3, training.micro_batch_size=1,"
        yield "training.activation_checkpointing=full, method=lora or qlora; docs/memory.md"
    else:
        yield f"{planned.verdict}: {apart} of {whole} are left for CUDA itself and fragmentation"


def table(plans: list[Planned]) -> str:
    """A line for each run."""
    heads = ["ranks", "weights", "optimizer", "kept", "peak", "host"]
    wide, unit = max(22, *(len(each.label) for each in plans)), _unit(plans)
    lines = [f"{f'{unit} of the fullest rank':<{wide}}  {'  '.join(heads)}"]
    for each in plans:
        sizes = (each.weights, each.optimizer, each.activations, each.peak, each.host)
        cells = [str(each.ranks), *(f"{size / UNITS[unit]:,.2f}" for size in sizes)]
        row = "  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
        lines.append(f"{each.label:<{wide}}  {row}  {each.verdict}".rstrip())
    return "\n".join([*lines, *dict.fromkeys(note for each in plans for note in each.notes)])


if __name__ == "__main__":
    main()
