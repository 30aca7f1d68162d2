"""`shardway train`: compose, check, freeze, launch.

    shardway train model=smollm2_135m method=lora strategy=fsdp data.path=my.jsonl

Hydra composes the configuration here, once. It is checked whole, frozen into the run folder, and
every rank reads that file. Under `torchrun … -m launcher.train` each rank composes the same
overrides, and rank 0 alone makes the folder. No torch is imported before the checks have passed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher import overview, paths, rank_log, run_dir, sweep, versions
from launcher.checkpoint import resume
from launcher.checkpoint.layout import Checkpoint
from launcher.cluster import command, compiled, local, slurm
from launcher.cluster.devices import (
    has_compiler,
    has_flash_attention,
    has_libaio,
    has_liger,
    interprets_triton,
    missing_packages,
    visible_gpus,
)
from launcher.config import Config, checks, deepspeed, store
from launcher.config.checks import World
from launcher.config.cluster import SlurmConfig
from launcher.config.strategy import ZeroConfig
from launcher.data import source
from launcher.errors import UserError
from launcher.run_dir import RunDir

UNUSABLE_CONFIGURATION = 2
ENDED_BY_A_PERSON = (rank_log.STOPPED, *(128 + number for number in local.TAKEN))


def main() -> None:
    """The command line. Exits with the ranks' status, or 2 when the configuration cannot run."""
    try:
        configs = compose()
        if len(configs) > 1:
            if _under_torchrun():
                raise UserError("--multirun is several runs, and one torchrun is one run")
            configs = sweep.place(configs)
        worlds = [check(config) for config in configs]
    except UserError as error:
        _refuse(str(error))
    if configs[0].launch.dry_run:
        if _rank() == 0:
            show(configs, worlds)
        return
    if _under_torchrun():
        from launcher import worker  # torch: a rank needs it, the submit side does not

        worker.attend(configs[0], sys.argv)
        return
    sys.exit(launch(configs[0], worlds[0]) if len(configs) == 1 else launch_sweep(configs, worlds))


def compose() -> list[Config]:
    """The configurations that the command line asks for: one, or one an element under --multirun.

    Raises UserError for what Hydra or the schema refuses.
    """
    composed: list[Any] = []  # plain mappings; the schema looks at them outside Hydra's job

    @hydra.main(version_base="1.3", config_path=str(paths.beside("conf")), config_name="config")
    def collect(raw: DictConfig) -> None:
        composed.append(OmegaConf.to_container(raw, resolve=True))

    register_resolvers()
    typed = list(sys.argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise here instead of printing a stack and exiting
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        _gather_overrides(
            "hydra.run.dir=.",  # Hydra makes no folders of its own: the run folder is ours
            f"hydra.sweep.dir={scratch}",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        )
        try:
            collect()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(hydra_sentence(error)) from error
        finally:
            sys.argv = typed
    if not composed:  # --help, --cfg and --info answer by themselves
        sys.exit(0)
    return [store.build(raw) for raw in composed]


def register_resolvers() -> None:
    """`${bundled:…}` and `${cache:…}` of conf/: files of the package and of the cache."""
    OmegaConf.register_new_resolver("bundled", lambda name: str(paths.bundled(name)), replace=True)
    OmegaConf.register_new_resolver("cache", lambda name: str(paths.cache() / name), replace=True)


def _gather_overrides(*ours: str) -> None:
    """Put `ours` before the user's, which then win, and all of them behind the options: argparse
    wants them in one place."""
    typed = [
        at
        for at, word in enumerate(sys.argv)
        if at
        and re.match(r"[+~\w]", word)
        and "=" in word
        and not sys.argv[at - 1].startswith("--c")  # --config-dir A=B is one of its folders
    ]
    options = [word for at, word in enumerate(sys.argv) if at not in typed]
    overrides = [sys.argv[at] for at in typed]
    if not {"--multirun", "-m"} & {*options}:  # a comma in it is no sweep: data.name=a,b is a list
        overrides = [re.sub(r"^data\.name=([\w.,-]+)$", r"data.name='\1'", o) for o in overrides]
    sys.argv = [*options, *ours, *overrides]


def check(config: Config) -> World:
    """Hold `config` against the rule table and its data file; return the ranks it will have.

    Raises ConfigError with everything that is wrong.
    """
    world = world_of(config)
    if found := problems(config, world):
        raise store.ConfigError(found)
    return world


def problems(config: Config, world: World) -> list[str]:
    """A sentence for everything that is wrong with `config` on `world`, and with its data."""
    return [*rule_problems(config, world), *source.problems(config.data)]


def rule_problems(config: Config, world: World) -> list[str]:
    """The same without a look at the data."""
    return [*checks.broken_rules(config, world), *_resume_problems(config)]


def _resume_problems(config: Config) -> list[str]:
    """What stands between a run and the checkpoint that it is to go on from."""
    try:
        checkpoint = _start(config)
        return resume.problems(checkpoint, config) if checkpoint else []
    except UserError as error:
        return [str(error)]


def _start(config: Config) -> Checkpoint | None:
    """The checkpoint that a run will go on from, if its files are whole: the ranks look."""
    checkpoints = RunDir(Path(config.run_dir or "")).checkpoints
    found = resume.candidates(config.resume, checkpoints)
    return next((each for each in found if each.is_finished), None)


def show(configs: list[Config], worlds: list[World]) -> None:
    """What would run. Touches nothing."""
    for config, world in zip(configs, worlds, strict=True):
        where = Path(config.run_dir or "runs/<time>")
        print(store.dump(config))
        print(f"# {world.size} ranks on {world.nodes} machine(s), {world.gpus} GPU(s) visible")
        if isinstance(config.strategy, ZeroConfig):
            told = (config.strategy, config.training, config.precision, world.size)
            print(f"# deepspeed.json\n{json.dumps(deepspeed.engine_config(*told), indent=2)}")
        if checkpoint := _start(config):
            print(f"# goes on from {checkpoint.path}")
        if not isinstance(config.cluster, SlurmConfig):
            print(f"# {shlex.join(command.torchrun(where, 1, world.nproc_per_node))}")
    if isinstance(config.cluster, SlurmConfig):
        slurm.show(config.cluster, where if len(configs) == 1 else where.parent, len(configs))


def launch(config: Config, world: World) -> int:
    """Freeze the configuration into a new run folder and run it to its end."""
    if difference := versions.difference():
        print(difference, file=sys.stderr)
    try:
        checkpoint = _start(config)
        if isinstance(config.cluster, SlurmConfig):
            return slurm.launch(config, config.cluster)
        run, frozen = run_dir.attempt(config, sys.argv, world.size)
    except UserError as error:
        _refuse(str(error))
    print(f"run folder: {run.path}", flush=True)
    if checkpoint:
        changed = resume.differences(checkpoint.config, frozen)
        print(f"goes on from {checkpoint.path.name}", *changed.free, *changed.breaking, sep="\n  ")
    try:
        if config.strategy.on_disk:
            compiled.disk_access(run)
    except UserError as error:
        _refuse(str(error))
    return local.launch(run, world.nproc_per_node, world.gpus)


def launch_sweep(configs: list[Config], worlds: list[World]) -> int:
    """One run after another here, or a job array. One that fails does not keep the others from
    their turn; a person who stops one stops the sweep. The status of the first that failed."""
    cluster, failed = configs[0].cluster, 0
    try:
        if isinstance(cluster, SlurmConfig):
            return slurm.launch_sweep(configs, cluster)
        folder = sweep.begin(configs)
        for config, world in zip(configs, worlds, strict=True):
            status = launch(config, world)
            failed = failed or status
            if status in ENDED_BY_A_PERSON:
                break
        print(f"\nsweep: {folder}\n{overview.summarise(folder)}", end="")
    except UserError as error:
        _refuse(str(error))
    return failed


def world_of(config: Config) -> World:
    """The ranks that `config` asks for, with what this machine has."""
    gpus, flash_attention = visible_gpus(), has_flash_attention()
    libaio = not config.strategy.on_disk or has_libaio()
    missing = missing_packages(config.tracking.trackers)
    compiler = config.training.compile == "off" or has_compiler()
    machine = (flash_attention, libaio, missing, compiler, has_liger(), interprets_triton())
    if _under_torchrun():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // per_node
        return World(nodes, per_node, gpus, _rank(), *machine)
    return World.of(config, gpus, *machine)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _rank() -> int:
    return int(os.environ["RANK"]) if _under_torchrun() else 0


def _refuse(sentence: str) -> NoReturn:
    if not _under_torchrun():
        print(sentence, file=sys.stderr)
    elif os.environ["LOCAL_RANK"] == "0":  # once a host: another host may lack what this one has
        print(f"{platform.node()}, rank {_rank()}: {sentence}", file=sys.stderr)
    sys.exit(UNUSABLE_CONFIGURATION)


def hydra_sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's messages without their boilerplate, with the nearest setting."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentence = " ".join(line for line in lines if not line.startswith(("object_type", "full_key")))
    unknown = re.match(r"Could not override '([^']+)'", sentence)
    return store.unknown(unknown[1]) if unknown else sentence


if __name__ == "__main__":
    main()
