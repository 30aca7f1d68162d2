"""`shardway check`: what this machine can do, and whether a run can start."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.cluster import numa, preflight, slurm
from launcher.cluster.settle import settle
from launcher.commands.arguments import command_parser
from launcher.config import Config
from launcher.config.compose import compose_command_line
from launcher.config.schema.cluster import SlurmConfig
from launcher.config.store import ConfigError
from launcher.errors import REFUSED as STATUS_REFUSED
from launcher.errors import UserError
from launcher.folders.model import is_hub_id
from launcher.io import network
from launcher.machines import doctor
from launcher.machines.doctor import Line
from launcher.machines.facts import data_files, digests, free_bytes, model_files
from launcher.machines.findings import OK, REFUSED, WARNING
from launcher.machines.space import checkpoint_size, find_missing_space, planned_checkpoints

ABOUT = """\
Show what this machine can do, one line a fact: ok, warning or refused, and after an arrow the way
out. With overrides, those of `shardway train`: whether that run can start. Nothing is written,
downloaded or queued.

    shardway check                        packages, GPUs, compiler, network, limits, Slurm, cache
    shardway check --json                 the same for a program
    shardway check method=lora strategy=fsdp data.path=my.jsonl cluster.nproc_per_node=8
    shardway check cluster=slurm cluster.gpus_per_node=8 strategy=fsdp …

Of a run it checks every rule between settings, opens the model (headers and small files, not the
weights) and the data, renders the first rows, compares the free space with the planned checkpoints,
and asks Slurm whether the job could start. The exit status is 2 if anything is refused.

To compare all machines of a run with each other when it starts: cluster.preflight=true, for
`shardway train`. What is compared: docs/reliability.md
"""
TOPIC = 15  # characters


def main() -> None:
    """Exits with 2 if anything is refused."""
    parser = command_parser("check", ABOUT, "%(prog)s [--json] [OVERRIDE ...]")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    options, overrides = parser.parse_known_args()
    sys.argv = [sys.argv[0], *overrides]
    lines = check_run() if overrides else doctor.inspect_host()
    found = list(_printed(lines, silent=options.json))
    if options.json:
        print(json.dumps([dataclasses.asdict(line) for line in found], indent=2))
    refused = sum(line.status == REFUSED for line in found)
    warned = sum(line.status == WARNING for line in found)
    if not options.json:
        print(f"\nof {len(found)}: {refused} refused, {warned} with a warning")
    sys.exit(STATUS_REFUSED if refused else 0)


def _printed(lines: Iterable[Line], silent: bool) -> Iterator[Line]:
    """The same lines, each printed as soon as it is known unless `silent`."""
    for line in lines:
        if not silent:
            print(format_line(line), flush=True)
        yield line


def format_line(line: Line) -> str:
    """`status topic text → way out`, further lines of the text below it."""
    indent = "\n" + " " * (9 + TOPIC)
    way_out = f" → {line.way_out}" if line.way_out else ""
    return f"{line.status:<9}{line.topic:<{TOPIC}}{line.text.replace(chr(10), indent)}{way_out}"


def check_run() -> Iterator[Line]:
    """Whether the runs that `sys.argv` asks for can start."""
    try:
        configs = compose_command_line()
    except UserError as error:
        yield from _refused("configuration", error)
        return
    for config in configs:
        if len(configs) > 1:
            yield Line(OK, "run", config.run_dir or "")
        yield from _check_config(config)


def _check_config(config: Config) -> Iterator[Line]:
    choice = settle(config)
    try:
        config = choice.config
        world = preflight.check(config)
    except ConfigError as error:
        yield from (Line(REFUSED, "configuration", each) for each in choice.explain(error.problems))
    else:
        ranks = f"{world.size} rank{'s' * (world.size > 1)}"
        machines = f"{world.nodes} machine{'s' * (world.nodes > 1)}"
        names = f"{config.method.name}, {config.strategy.name}, {config.precision.name}"
        yield Line(OK, "configuration", f"{names}: {ranks} on {machines}, {world.gpus} GPUs each")
        yield from _check_start(config, world.nproc_per_node, world.gpus)
    yield from (Line(OK, "chosen", text) for text in choice.lines)
    yield from _check_run_dir(config)
    yield from _check_files(config)
    yield from _check_space(config)


def _check_start(config: Config, ranks: int, gpus: int) -> Iterator[Line]:
    """What only a run that obeys the rules is asked: its rows, and where it starts."""
    try:
        preflight.check_first_rows(config)
        if not is_hub_id(config.model.name_or_path) and not config.model.add_tokens:
            yield Line(OK, "first rows", "the chat template renders them; the model can be trained")
    except ConfigError as error:
        yield from _refused("first rows", error)
    try:
        if isinstance(config.cluster, SlurmConfig):
            slurm.refuse_impossible(config.cluster, Path(config.run_dir or "runs"))
            yield Line(OK, "Slurm", "such a job can start")
        else:
            numa.numa_mode(config.cluster, ranks, gpus)
            _refuse_interface(config.cluster.interface)
    except UserError as error:
        yield from _refused("start", error)


def _refuse_interface(name: str) -> None:
    """Raise UserError if this machine has no interface of this name."""
    found = network.interfaces()
    if name not in ("auto", *found):
        raise UserError(
            f"cluster.interface={name}: this machine has only {', '.join(found)} → "
            "cluster.interface=auto, or one of these"
        )


def _check_run_dir(config: Config) -> Iterator[Line]:
    folder = config.run_dir
    if folder and Path(folder).exists() and config.resume != "auto":
        text = f"run_dir={folder} exists, and nothing is overwritten"
        yield Line(REFUSED, "run folder", text, "another run_dir, or resume=auto")


def _check_files(config: Config) -> Iterator[Line]:
    for topic, find in (("model", model_files), ("data", data_files)):
        problems: list[str] = []
        files = digests(find(config, problems), problems)
        yield from (Line(REFUSED, topic, each) for each in problems)
        if files:
            size = sum(Path(file).stat().st_size for file in files)
            count = f"{len(files)} file{'s' * (len(files) > 1)}"
            yield Line(OK, topic, f"{count} of {size / 1e6:,.1f} MB can be read")
        elif not problems:
            yield Line(WARNING, topic, "on the hub: not opened here", "download it before the job")


def _check_space(config: Config) -> Iterator[Line]:
    folder = Path(config.run_dir or "runs").absolute()
    missing = list(find_missing_space(config, folder))
    for finding in missing:
        text, _, way_out = finding.text.partition(" → ")
        yield Line(finding.status, "space", text, way_out)
    size, free = checkpoint_size(config), free_bytes(folder)
    if not missing and size is not None and free is not None:
        planned = f"{planned_checkpoints(config)} × {size / 1e9:,.2f} GB of checkpoints"
        yield Line(OK, "space", f"{planned}, {free / 1e9:,.1f} GB free")


def _refused(topic: str, error: UserError) -> Iterator[Line]:
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    yield from (Line(REFUSED, topic, each) for each in problems)
