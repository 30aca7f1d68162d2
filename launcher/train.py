"""`shardway train`: compose, check, freeze, launch.

    shardway train model=smollm2_135m method=lora strategy=fsdp data.path=my.jsonl

Hydra composes the configuration here, once. It is checked, then frozen into the run folder, and
every rank reads that file. Under `torchrun … -m launcher.train` each rank composes the same
overrides, and only rank 0 creates the folder. torch is not imported before the checks have passed.
"""

from __future__ import annotations

import os
import platform
import sys
from typing import NoReturn

from launcher.cluster.launch import launch, launch_sweep, print_dry_run
from launcher.cluster.liveness import refuse_to_join
from launcher.cluster.preflight import check, check_first_rows, get_rank
from launcher.cluster.settle import settle
from launcher.config.compose import compose_command_line
from launcher.config.rules.rule import World
from launcher.config.store import ConfigError
from launcher.errors import REFUSED, UserError
from launcher.run import parent, started_by, sweep
from launcher.run.auto import Choice


def main() -> None:
    """Exit with the ranks' status, or with 2 if the configuration cannot run."""
    if started_by.is_rank():
        parent.die_with_agent()
    try:
        sys.exit(train())
    except UserError as error:
        _refuse(str(error))


def train() -> int:
    """Run what `sys.argv` asks for; return the exit status. Raises UserError if it cannot run."""
    configs = compose_command_line()
    if len(configs) > 1:
        if started_by.is_rank():
            raise UserError("--multirun starts several runs, but one torchrun starts one run")
        configs = sweep.assign_run_dirs(configs)
    choices = [settle(config) for config in configs]
    configs = [choice.config for choice in choices]
    worlds = [_check(choice) for choice in choices]
    if configs[0].cluster.name == "slurm":
        check_first_rows(configs[0])  # a sweep seldom changes the rows
    if configs[0].launch.dry_run:
        if get_rank() == 0:
            print_dry_run(choices, worlds)
        return 0
    if get_rank() == 0:
        for config in configs:
            refuse_to_join(config)
    if started_by.is_rank():
        from launcher import worker  # imports torch, which only a rank needs

        worker.train_under_torchrun(configs[0], sys.argv)
    return launch(choices[0], worlds[0]) if len(configs) == 1 else launch_sweep(choices, worlds)


def _check(choice: Choice) -> World:
    try:
        return check(choice.config)
    except ConfigError as error:
        raise ConfigError(choice.explain(error.problems)) from None


def _refuse(message: str) -> NoReturn:
    if not started_by.is_rank():
        print(message, file=sys.stderr)
    elif os.environ["LOCAL_RANK"] == "0":  # once per machine: a file may be missing on one
        print(f"{platform.node()}, rank {get_rank()}: {message}", file=sys.stderr)
    sys.exit(REFUSED)


if __name__ == "__main__":
    main()
