"""`shardway plan --search`: the configurations that fit, the fastest first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from launcher.cluster.gpu_specs import GpuSpec, spec_named, spec_of_device
from launcher.cluster.gpus import gpu_name
from launcher.commands.arguments import UNITS
from launcher.config import Config
from launcher.config.overrides import key_of
from launcher.errors import UserError
from launcher.memory.planning import Memory, batch_notes, make_plannable, plannable_world
from launcher.memory.search import FoundRun, Search
from launcher.memory.target import Target
from launcher.memory.tracers import Tracers

GBIT = 8  # Gbit/s of 1 GB/s
SHOWN = 10  # configurations, unless --show asks for another number


def main(config: Config, overrides: list[str], target: Target, options: argparse.Namespace) -> int:
    """Search around `config`, of which `overrides` were typed. Returns the exit status: 0, or 1 if
    nothing fits."""
    gpu = _gpu(options)
    memory = Memory(gpu=target.device.memory, host=target.host)
    if memory.gpu is None:
        raise UserError("--search needs the memory of a GPU → --memory 80GB")
    plannable, changes = make_plannable(config)
    world, notes = plannable_world(plannable, target)
    typed = [key_of(word) for word in overrides if "=" in word and not word.endswith("=auto")]
    if sys.stderr.isatty():
        print(f"searching for {world.size} ranks …", file=sys.stderr, flush=True)
    with Tracers(world) as tracers:
        search = Search(plannable, typed, world, memory, tracers)
        found = search.run(gpu)
    searched = {"training.micro_batch_size"} - set(typed)
    notes = [*batch_notes(config, searched), *changes, *notes, *search.notes]
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
        for note in notes:
            print(note, file=sys.stderr)
    else:
        print(format_found(found, options.show or SHOWN, memory.gpu, f"{world.size} × {gpu.name}"))
        print("\n".join(notes), end="\n" if notes else "", flush=True)
    return 0 if found else 1


def _gpu(options: argparse.Namespace) -> GpuSpec:
    """The GPU of --gpu, or of this machine, with the network of --network."""
    if options.gpu is not None:
        spec = spec_named(options.gpu)
    else:
        name = gpu_name()
        found = spec_of_device(name) if name else None
        if found is None:
            whose = f"that of {name} is not known" if name else "this machine has no GPU"
            raise UserError(f"--search estimates speeds, and {whose} → --gpu H100")
        spec = found
    if options.network is not None:
        spec = dataclasses.replace(spec, network=options.network / GBIT)
    return spec


def format_found(found: list[FoundRun], limit: int, memory: int, gpus: str) -> str:
    """A table of the first `limit` configurations."""
    size = f"{memory / UNITS['GB']:,.0f} GB"
    if not found:
        return (
            f"nothing fits into {size} of {gpus}: more ranks, a smaller data.max_length, "
            "method=lora or method=qlora"
        )
    count = "1 configuration fits" if len(found) == 1 else f"{len(found)} configurations fit"
    lines = [
        f"{count} into {size}; speeds are estimates for {gpus}",
        "  tokens/s  peak GB  host GB         to type",
    ]
    for run in found[:limit]:
        peak, host = run.peak / UNITS["GB"], run.host / UNITS["GB"]
        words = " ".join(run.overrides) or "(nothing more)"
        lines.append(
            f"{run.tokens_per_second:10,.0f} {peak:8,.2f} {host:8,.2f}  {run.verdict:<5}  {words}"
        )
    if len(found) > limit:
        lines.append(f"and {len(found) - limit} slower ones → --show {len(found)}")
    return "\n".join(lines)
