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
    store: dist.Store, rank: int, world_size: int, fingerprint: str, create: Callable[[], RunDir]
) -> RunDir:
    """Every rank names its configuration's hash; if all are equal rank 0 makes the run folder.

    All ranks return it, or all raise UserError with the same sentence and nothing is made.
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
    kind, _, text = verdict.partition(" ")
    if kind == "refused":
        raise UserError(text)
    attempt, _, path = text.partition(" ")
    if not Path(path).is_dir():
        raise UserError(
            f"rank {rank} cannot see {path}, which rank 0 made; "
            "set run_dir to a folder that every machine shares"
        )
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
