"""The ranks choose what is auto in their configuration, before they build anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist

from launcher.config import Config
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.table import RULES, broken_rules
from launcher.config.schema.precision import PRECISIONS
from launcher.config.schema.strategy import STRATEGIES, HsdpConfig
from launcher.config.store import ConfigError
from launcher.distributed.agreement import agree
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders.model import model_folder
from launcher.folders.run import RunDir
from launcher.io.host_memory import usable_memory
from launcher.run import auto, create, resume
from launcher.run.auto import Choice, Device
from launcher.training.arithmetic import set_arithmetic


def settle(
    run: RunDir, config: Config, rank_info: RankInfo, store: dist.Store, log: Callable[[str], None]
) -> Config:
    """`config` without auto, and this process with the arithmetic that it asks for. `log` receives
    what was chosen, and what makes a run on GPUs slow. Collective, through `store`.

    Raises UserError on all ranks if a choice breaks a rule between settings, or if it needs
    machines with as many ranks each and they have not.
    """
    device = device_of(rank_info)
    if auto.is_open(config) or _copies_are_of_machines(config):
        choice = _agree(run, config, device, rank_info, store)
        config = choice.config
        for line in choice.lines:
            log(line)
    for line in _advice(config, device):
        log(line)
    if arithmetic := set_arithmetic(config.training):
        log(f"arithmetic: {arithmetic}")
    return config


def _advice(config: Config, device: Device) -> Iterator[str]:
    if device.is_gpu:
        lines = (auto.warn_about_fp32(config, device), auto.unused_levers(config))
        yield from (line for line in lines if line is not None)


def device_of(rank_info: RankInfo) -> Device:
    """What this rank computes on."""
    if rank_info.device.type != "cuda":
        return Device("CPU", False, False, usable_memory() // rank_info.local_world_size)
    found = torch.cuda.get_device_properties(rank_info.device)
    has_bf16 = found.major >= auto.BF16_CAPABILITY or torch.version.hip is not None
    free, total = torch.cuda.mem_get_info(rank_info.device)
    in_use = auto.memory_in_use(total, free)
    return Device(found.name, True, has_bf16, found.total_memory, in_use)


def _agree(
    run: RunDir, config: Config, device: Device, rank_info: RankInfo, store: dist.Store
) -> Choice:
    """What rank 0 chooses from the devices of all ranks, and freezes."""

    def decide(said: list[str]) -> str:
        answers = [json.loads(each) for each in said]
        devices = [Device(**each["device"]) for each in answers]
        ranks_of_machines = {each["ranks"] for each in answers}
        choice = _choose(run, config, devices, rank_info, ranks_of_machines)
        sections = {
            "precision": dataclasses.asdict(choice.config.precision),
            "strategy": dataclasses.asdict(choice.config.strategy),
        }
        return json.dumps({**sections, "lines": choice.lines})

    said = json.dumps({"device": dataclasses.asdict(device), "ranks": rank_info.local_world_size})
    minutes = config.launch.rendezvous_minutes
    text = agree(store, rank_info.rank, rank_info.world_size, "auto", said, decide, minutes)
    choice = _parse(config, json.loads(text))
    writes = rank_info.is_main or (not config.launch.shared_disk and rank_info.local_rank == 0)
    if auto.is_open(config) and writes:
        create.write_choice(run, choice.config, rank_info.world_size)
    return choice


def _choose(
    run: RunDir,
    config: Config,
    devices: list[Device],
    rank_info: RankInfo,
    ranks_of_machines: Collection[int],
) -> Choice:
    """What is auto in `config`. Raises UserError if config.json cannot be read, or if the choice
    breaks a rule, or needs as many ranks on each machine."""
    is_even = len(ranks_of_machines) == 1
    # Where machines differ there are no groups of a machine's ranks, as on a single one.
    source, per_node = config.model, min(ranks_of_machines) if is_even else len(devices)
    gpus = per_node if rank_info.device.type == "cuda" else 0
    # What is installed has been checked; rank 0 would look whether the run folder is new.
    machine = Machine(gpus=gpus, flash_attention=True, liger=True, triton_interpreter=True)
    world = World(rank_info.world_size // per_node, per_node, machine, rank=1)
    folder = model_folder(source.name_or_path, source.revision, patterns=("config.json",))
    choice = auto.choose(config, devices, world, folder, resume.resumed_config(config, run))
    if not is_even and _copies_are_of_machines(choice.config):
        counts = " and ".join(map(str, sorted(ranks_of_machines)))
        raise UserError(
            f"strategy={choice.config.strategy.name} keeps a copy on the ranks of each machine, "
            f"and these have {counts} ranks → strategy=fsdp, or a strategy.shard_size"
        )
    rules = tuple(rule for rule in RULES if not rule.broken(config, world))
    if problems := broken_rules(choice.config, world, rules):
        raise ConfigError(choice.explain(problems))
    return choice


def _copies_are_of_machines(config: Config) -> bool:
    """Whether the ranks of a machine share a copy of the state, however many they are."""
    strategy = config.strategy
    return isinstance(strategy, HsdpConfig) and strategy.shard_size is None


def _parse(config: Config, text: dict[str, Any]) -> Choice:
    precision, strategy = text["precision"], text["strategy"]
    chosen = dataclasses.replace(
        config,
        precision=PRECISIONS[precision["name"]](**precision),
        strategy=STRATEGIES[strategy["name"]](**strategy),
    )
    return Choice(chosen, text["lines"])
