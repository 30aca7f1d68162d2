"""One run folder for all ranks of `torchrun … -m launcher.train`, agreed on through the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from launcher.distributed.rendezvous import wait_for_ranks
from launcher.errors import UserError
from launcher.folders.run import RunDir


def agree_on_run(
    store: dist.Store,
    rank: int,
    world_size: int,
    fingerprint: str,
    create: Callable[[], RunDir],
    shared: bool = True,
) -> RunDir:
    """Compare the configurations of all ranks; if they are equal, rank 0 calls `create`.

    `fingerprint` is the hash of this rank's configuration. Returns rank 0's run folder on all
    ranks. Otherwise all ranks raise UserError with the same message, and nothing is created. If the
    disk is `shared`, a rank that cannot see the folder raises UserError too.
    """
    if rank == 0:
        verdict = _compare_and_create(store, world_size, fingerprint, create)
        store.set("shardway/verdict", verdict)
        wait_for_ranks(store, [f"shardway/heard/{other}" for other in range(1, world_size)])
    else:
        store.set(f"shardway/fingerprint/{rank}", fingerprint)
        wait_for_ranks(store, ["shardway/verdict"])
        verdict = store.get("shardway/verdict").decode()
        store.set(f"shardway/heard/{rank}", "")
    run = _parse_verdict(verdict)
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
) -> RunDir:
    """The run folder of this machine, if the machines do not share a disk. Rank 0's machine has
    `main_run`; on each other machine, one rank creates a folder with `create`.

    `create` is None on the other ranks. Returns on every rank the folder of its machine, or raises
    UserError on all ranks.
    """
    if node and create is not None:
        store.set(f"shardway/folder/{node}", _create_on_node(main_run, create))
    wait_for_ranks(store, [f"shardway/folder/{other}" for other in range(1, nodes)])
    runs = [main_run] + [
        _parse_verdict(store.get(f"shardway/folder/{other}").decode()) for other in range(1, nodes)
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
    attempt, _, path = text.partition(" ")
    return RunDir(Path(path), int(attempt))


def _compare_and_create(
    store: dist.Store, world_size: int, fingerprint: str, create: Callable[[], RunDir]
) -> str:
    """A verdict, as `_parse_verdict` reads it."""
    try:
        wait_for_ranks(store, [f"shardway/fingerprint/{rank}" for rank in range(1, world_size)])
        for rank in range(1, world_size):
            if store.get(f"shardway/fingerprint/{rank}").decode() != fingerprint:
                raise UserError(
                    f"rank {rank} has composed a different configuration than rank 0; start every "
                    "torchrun with the same overrides and conf/ (compare with --cfg job --resolve)"
                )
        run = create()
        return f"made {run.attempt} {run.path}"
    except UserError as error:
        return f"refused {error}"
