"""One run folder for all ranks of a `torchrun … -m launcher.train`, through the launch's store."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from launcher.errors import UserError
from launcher.run_dir import RunDir

PATIENCE = timedelta(minutes=5)


def agree_on_run(
    store: dist.Store,
    rank: int,
    world_size: int,
    fingerprint: str,
    create: Callable[[], RunDir],
    shared: bool = True,
) -> RunDir:
    """Every rank names its configuration's hash; if all are equal rank 0 makes the run folder.

    All ranks return it, or all raise UserError with the same sentence and nothing is made. One that
    cannot see it raises, too, where the disk is `shared`.
    """
    if rank == 0:
        verdict = _decide(store, world_size, fingerprint, create)
        store.set("shardway/verdict", verdict)
        _wait(store, [f"shardway/heard/{other}" for other in range(1, world_size)])
    else:
        store.set(f"shardway/fingerprint/{rank}", fingerprint)
        _wait(store, ["shardway/verdict"])
        verdict = store.get("shardway/verdict").decode()
        store.set(f"shardway/heard/{rank}", "")
    made = _made(verdict)
    if shared and not made.path.is_dir():
        raise UserError(
            f"rank {rank} cannot see {made.path}, which rank 0 made; set run_dir to a folder that "
            "every machine shares, or launch.shared_disk=false"
        )
    return made


def folder_of_machine(
    store: dist.Store, theirs: RunDir, node: int, nodes: int, create: Callable[[], RunDir] | None
) -> RunDir:
    """Where machines share no disk: the first rank of each but rank 0's makes a run folder there,
    by `create`. Every rank returns that of its machine, or all raise UserError.

    `theirs` is the folder that rank 0 made.
    """
    if node and create is not None:
        store.set(f"shardway/folder/{node}", _make_another(theirs, create))
    _wait(store, [f"shardway/folder/{other}" for other in range(1, nodes)])
    folders = [theirs] + [
        _made(store.get(f"shardway/folder/{other}").decode()) for other in range(1, nodes)
    ]
    return folders[node]


def _make_another(theirs: RunDir, create: Callable[[], RunDir]) -> str:
    try:
        made = create()
    except UserError as error:
        return f"refused launch.shared_disk=false: {error}"
    if made.path == theirs.path and theirs.logs.is_dir() and made.logs != theirs.logs:
        return (
            f"refused launch.shared_disk=false, and another machine sees {theirs.logs}, which rank "
            "0 made; leave launch.shared_disk at true"
        )
    return f"made {made.attempt} {made.path}"


def _made(verdict: str) -> RunDir:
    """The folder of `made ATTEMPT PATH`. Raises UserError for `refused SENTENCE`."""
    kind, _, text = verdict.partition(" ")
    if kind == "refused":
        raise UserError(text)
    attempt, _, path = text.partition(" ")
    return RunDir(Path(path), int(attempt))


def _decide(
    store: dist.Store, world_size: int, fingerprint: str, create: Callable[[], RunDir]
) -> str:
    """`made ATTEMPT PATH` or `refused SENTENCE`."""
    try:
        _wait(store, [f"shardway/fingerprint/{rank}" for rank in range(1, world_size)])
        for rank in range(1, world_size):
            if store.get(f"shardway/fingerprint/{rank}").decode() != fingerprint:
                raise UserError(
                    f"rank {rank} composed another configuration than rank 0; start every torchrun "
                    "with the same overrides and conf/ (compare with --cfg job --resolve)"
                )
        made = create()
        return f"made {made.attempt} {made.path}"
    except UserError as error:
        return f"refused {error}"


def _wait(store: dist.Store, keys: list[str]) -> None:
    try:
        store.wait(keys, PATIENCE)
    except dist.DistStoreError as error:
        missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
        raise UserError(
            f"no word from rank {', '.join(missing)} in {PATIENCE.seconds // 60} minutes; "
            "its own output says why, or its torchrun was not started"
        ) from error
