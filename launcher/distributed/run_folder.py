"""One run folder for all ranks of `torchrun … -m launcher.train`, agreed on through the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from launcher.distributed.agreement import agree
from launcher.distributed.rendezvous import wait_for_ranks
from launcher.errors import UserError
from launcher.folders.run import RunDir


def agree_on_run(
    store: dist.Store,
    rank: int,
    world_size: int,
    fingerprint: str,
    create: Callable[[], RunDir],
    shared: bool,
    minutes: float,
) -> RunDir:
    """Compare the configurations of all ranks; if they are equal, rank 0 calls `create`.

    `fingerprint` is the hash of this rank's configuration. Returns rank 0's run folder on all
    ranks. Otherwise all ranks raise UserError with the same message, and nothing is created. If the
    disk is `shared`, a rank that cannot see the folder raises UserError too.
    """

    def decide(fingerprints: list[str]) -> str:
        for other, theirs in enumerate(fingerprints):
            if theirs != fingerprint:
                raise UserError(
                    f"rank {other} has composed a different configuration than rank 0; start every "
                    "torchrun with the same overrides and conf/ (compare with --cfg job --resolve)"
                )
        run = create()
        return f"{run.attempt} {run.path}"

    text = agree(store, rank, world_size, "folder", fingerprint, decide, minutes)
    run = _parse(text)
    if shared and not run.path.is_dir():
        raise UserError(
            f"rank {rank} cannot see {run.path}, which rank 0 created; set run_dir to a folder "
            "that every machine shares, or launch.shared_disk=false"
        )
    return run


def run_folder_of_node(
    store: dist.Store,
    main_run: RunDir,
    node: int,
    nodes: int,
    create: Callable[[], RunDir] | None,
    minutes: float,
) -> RunDir:
    """The run folder of this machine, if the machines do not share a disk. Rank 0's machine has
    `main_run`; on each other machine, one rank creates a folder with `create`.

    `create` is None on the other ranks. Returns on every rank the folder of its machine, or raises
    UserError on all ranks.
    """
    if node and create is not None:
        store.set(f"shardway/node/{node}", _create_on_node(main_run, create))
    wait_for_ranks(store, [f"shardway/node/{other}" for other in range(1, nodes)], minutes)
    runs = [main_run] + [
        _parse_verdict(store.get(f"shardway/node/{other}").decode()) for other in range(1, nodes)
    ]
    return runs[node]


def _create_on_node(main_run: RunDir, create: Callable[[], RunDir]) -> str:
    """A verdict, as `_parse_verdict` reads it."""
    try:
        run = create()
    except UserError as error:
        return f"refused launch.shared_disk=false: {error}"
    if run.path == main_run.path and main_run.logs.is_dir() and run.logs != main_run.logs:
        return (
            f"refused launch.shared_disk=false, but another machine can see {main_run.logs}, which "
            "rank 0 created; leave launch.shared_disk at true"
        )
    return f"made {run.attempt} {run.path}"


def _parse_verdict(verdict: str) -> RunDir:
    """The folder of `made ATTEMPT PATH`. Raises UserError for `refused MESSAGE`."""
    kind, _, text = verdict.partition(" ")
    if kind == "refused":
        raise UserError(text)
    return _parse(text)


def _parse(text: str) -> RunDir:
    """The folder of `ATTEMPT PATH`."""
    attempt, _, path = text.partition(" ")
    return RunDir(Path(path), int(attempt))
