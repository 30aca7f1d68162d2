"""One run folder for all ranks of a `torchrun … -m launcher.train`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from launcher.errors import UserError

PATIENCE = timedelta(minutes=5)


def agree_on_run(
    store: dist.Store, rank: int, fingerprint: str, create: Callable[[], Path]
) -> Path:
    """Rank 0 makes the run folder and publishes it with the hash of its configuration.

    The others wait for it. Raises UserError on a rank that composed another configuration, or that
    cannot see the folder.
    """
    if rank == 0:
        try:
            folder = create()
        except UserError:
            store.set("shardway/run", "\n")  # let the others go: rank 0 reports why
            raise
        store.set("shardway/run", f"{fingerprint}\n{folder}")
        return folder
    store.wait(["shardway/run"], PATIENCE)
    published, _, path = store.get("shardway/run").decode().partition("\n")
    if not published:
        raise UserError("rank 0 could not make the run folder; its message says why")
    if published != fingerprint:
        raise UserError(
            f"rank {rank} composed another configuration than rank 0; start every torchrun with "
            "the same overrides and the same conf/ (compare with --cfg job --resolve)"
        )
    if not Path(path).is_dir():
        raise UserError(
            f"rank {rank} cannot see {path}, which rank 0 made; "
            "set run_dir to a folder that every machine shares"
        )
    return Path(path)
