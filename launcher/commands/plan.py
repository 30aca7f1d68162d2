"""`shardway plan`: how much memory a run will need, before it is queued and without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator

from launcher.cluster.gpu_specs import spec_named
from launcher.commands import plan_search
from launcher.commands.arguments import UNITS, command_parser, number, parse_size
from launcher.config import Config
from launcher.config.compose import compose_command_line
from launcher.config.overrides import key_of
from launcher.errors import UserError
from launcher.folders.model import MAX_SHARD_BYTES
from launcher.memory import target as target_module
from launcher.memory.planning import Memory, PlannedRun, plan_run
from launcher.memory.target import Target
from launcher.run import sweep

ABOUT = """\
Show how much memory the fullest rank of a run will need. Takes the overrides of `shardway train`.
The training code runs two steps on tensors without memory. This needs no GPU and no weights, only
the model's config.json. All rows have the length data.max_length.

The first line says for what the run is planned: the GPU of --gpu, otherwise this machine's. On a
machine without one, it is any GPU that computes in bf16, or the CPU if cluster.cpu_processes=N is
typed.

    shardway plan model.name_or_path=meta-llama/Llama-3.1-8B method=lora cluster.nproc_per_node=8
    shardway plan --gpu H100 method=full strategy=fsdp cluster.nproc_per_node=4
    shardway plan --memory 80GB --multirun strategy=ddp,fsdp,zero3 training.micro_batch_size=1,4
    shardway plan --search --gpu H100 method=full cluster.nproc_per_node=8

--multirun plans every combination, and prints one line of a table for each. --search tries what is
not typed of strategy, precision, training.micro_batch_size and training.activation_checkpointing,
and prints what fits with an estimate of its speed, the fastest first. The exit status is 1 if a run
does not fit into --memory and --host-memory (with --search: if none does), and 2 if a run cannot be
planned. What is counted, and how speed is estimated: docs/memory.md
"""
BAR_WIDTH = 40
USUAL_OPEN_FILES = 1024  # what a process may usually have


def main() -> None:
    """Exits with 1 if a run does not fit, and with 2 if one cannot be planned."""
    options, overrides = _parser().parse_known_args()
    _refuse_options_of_search(options)
    sys.argv = [sys.argv[0], *["--multirun"] * options.multirun, *overrides]
    configs = compose_command_line()
    targets = [target_of(config, overrides, options) for config in configs]
    if options.search:
        sys.exit(plan_search.main(configs[0], overrides, targets[0], options))
    plans, errors = plan_each(configs, targets)
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
        "--memory", metavar="SIZE", help="of a GPU, such as 80GB; default: that of the GPU"
    )
    parser.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="of a machine, such as 1TB; default: this machine's, if it is planned for its devices",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers of bytes as JSON")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--multirun", "-m", action="store_true", help="plan every combination of strategy=a,b …"
    )
    either.add_argument(
        "--search", action="store_true", help="find the configurations that fit, fastest first"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="such as H100, with its memory unless --memory is given; default: this machine's",
    )
    parser.add_argument(
        "--network",
        metavar="GBIT",
        type=number(float, 0.001),
        help="for --search: Gbit/s to other machines for each GPU; default: as usual for the GPU",
    )
    parser.add_argument(
        "--show",
        metavar="N",
        type=number(int, 1),
        help=f"for --search: configurations to print ({plan_search.SHOWN}); --json prints all",
    )
    return parser


def _refuse_options_of_search(options: argparse.Namespace) -> None:
    """Raise UserError if an option of --search is typed without it."""
    for name in () if options.search else ("network", "show"):
        if (value := getattr(options, name)) is not None:
            raise UserError(f"--{name} {value} changes only what --search prints → add --search")


def target_of(config: Config, overrides: list[str], options: argparse.Namespace) -> Target:
    """What `config` is planned for, with the memory that the options name."""
    typed = {key_of(word) for word in overrides if "=" in word}
    memory = None if options.memory is None else parse_size(options.memory, "--memory")
    gpu = None if options.gpu is None else spec_named(options.gpu)
    target = target_module.choose(config, typed, gpu, memory)
    if options.host_memory is None:
        return target
    return dataclasses.replace(target, host=parse_size(options.host_memory, "--host-memory"))


def plan_each(configs: list[Config], targets: list[Target]) -> tuple[list[PlannedRun], list[str]]:
    """The plans, and an error message for each run that cannot be planned."""
    labels = [
        " ".join(f"{key}={value}" for key, value in settings.items())
        for settings in sweep.differing_settings([dataclasses.asdict(config) for config in configs])
    ]
    plans, errors = [], []
    for label, config, target in zip(labels, configs, targets, strict=True):
        if sys.stderr.isatty():
            print(f"planning {label or 'two steps'} …", file=sys.stderr, flush=True)
        try:
            plans.append(plan_run(config, label, target))
        except UserError as error:
            errors.append(f"{label}: {error}" if label else str(error))
    return plans, errors


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
    head = f"the fullest of {_ranks(planned.ranks)}" if planned.ranks > 1 else "the only rank"
    lines = [f"planned for {planned.target}", f"{head:<38}{unit}"]
    for name, size in rows:
        bar = "#" * round(BAR_WIDTH * size / scale)
        lines.append(f"  {name:<28} {size / UNITS[unit]:9,.2f}  {bar}".rstrip())
    return "\n".join([*lines, *beside_the_gpu(planned, unit), *planned.notes, *advice(planned)])


def beside_the_gpu(planned: PlannedRun, unit: str) -> Iterator[str]:
    """Lines about host memory, disk and open files, where they are needed."""
    each = _ranks(planned.ranks_per_machine)
    rows = [
        (f"to load, {each}", planned.ranks_per_machine * planned.loading),
        (f"offloaded, {each}", planned.ranks_per_machine * planned.host),
        (f"for async_save, {each}", planned.ranks_per_machine * planned.staging),
        ("to save, on rank 0", planned.gathering),
    ]
    if any(size for _, size in rows):
        yield "host memory of a machine"
    yield from (f"  {name:<28} {size / UNITS[unit]:9,.2f}" for name, size in rows if size)
    disk = (
        ("a checkpoint, on disk", planned.checkpoint, planned.checkpoint_files),
        ("an export", planned.export, max(1, -(-planned.export // MAX_SHARD_BYTES))),
    )
    for name, size, files in disk:
        some = "1 file" if files == 1 else f"{files:,} files"
        yield f"{name:<30} {size / UNITS[unit]:9,.2f}  in {some} and small ones"
    if planned.open_files > USUAL_OPEN_FILES:
        yield f"{'open files of a rank (ulimit -n)':<32} {planned.open_files:7,}"
    if planned.loading:
        yield "the files of this model differ from it in memory: every rank reads the whole model"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _choose_unit(plans: list[PlannedRun]) -> str:
    """A unit that is small enough for all peaks."""
    return "GB" if min(planned.peak for planned in plans) >= UNITS["GB"] else "MB"


def advice(planned: PlannedRun) -> Iterator[str]:
    """Lines about whether the run fits, by how much, and what reduces its memory."""
    if planned.memory is None:
        if not planned.on_cpu:
            yield "the memory to compare with is not known → --gpu H100, or --memory 80GB"
        return
    unit = _choose_unit([planned])
    if planned.host_memory is not None and planned.host_peak > planned.host_memory:
        missing = (planned.host_peak - planned.host_memory) / UNITS[unit]
        yield (
            f"does not fit into {planned.host_memory / UNITS[unit]:,.2f} {unit} of host memory: "
            f"{missing:,.2f} {unit} too much → fewer ranks on more machines"
        )
    free, memory = planned.memory - planned.peak, f"{planned.memory / UNITS[unit]:,.2f} {unit}"
    difference = f"{abs(free) / UNITS[unit]:,.2f} {unit}"
    if free < 0:
        yield f"does not fit into {memory}: {difference} too much"
        yield "what helps: more ranks under strategy=fsdp or zero3, training.micro_batch_size=1,"
        yield "training.activation_checkpointing=full, method=lora or qlora; docs/memory.md"
    else:
        rest = f"{difference} of {memory} are left"
        verdict = Memory(gpu=planned.memory).verdict(planned.peak, 0)
        others = "Python and its libraries" if planned.on_cpu else "CUDA itself and fragmentation"
        yield f"{verdict}: {rest} for {others}"


def format_table(plans: list[PlannedRun]) -> str:
    """One line for each run, and the notes of all runs."""
    targets = dict.fromkeys(f"planned for {planned.target}" for planned in plans)
    columns = ["ranks", "weights", "optimizer", "kept", "peak", "host"]
    width, unit = max(22, *(len(planned.label) for planned in plans)), _choose_unit(plans)
    lines = [*targets, f"{f'{unit} of the fullest rank':<{width}}  {'  '.join(columns)}"]
    for planned in plans:
        sizes = (
            planned.weights, planned.optimizer, planned.activations, planned.peak, planned.host
        )  # fmt: skip
        cells = [str(planned.ranks), *(f"{size / UNITS[unit]:,.2f}" for size in sizes)]
        row = "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, columns, strict=True))
        lines.append(f"{planned.label:<{width}}  {row}  {planned.verdict}".rstrip())
    notes = dict.fromkeys(note for planned in plans for note in planned.notes)
    return "\n".join([*lines, *notes])
