"""Ranks of several nodes, each started by a torchrun of its own. Imports no torch at its top."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.errors import UserError

PATIENCE_SECONDS = 300


def spread() -> None:
    """Make the rank and the number of ranks that torchrun counted on this node those of the job."""
    nodes, node = int(os.environ["SHARDWAY_NODES"]), int(os.environ["SHARDWAY_NODE"])
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ["RANK"] = str(node * here + int(os.environ["LOCAL_RANK"]))
    os.environ["WORLD_SIZE"] = str(nodes * here)


def meet(file: Path) -> Any:
    """The key-value store of the job. Rank 0 binds a free port and then says in `file` where.

    Raises UserError when it says nothing, or cannot be reached.
    """
    import torch.distributed as dist

    if os.environ["RANK"] == "0":
        host = socket.gethostname()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        manifest.write_text(file, f"{host} {store.port}\n")
        return store
    host, port = _read(file)
    try:
        return dist.TCPStore(host, port, is_master=False)
    except dist.DistError as error:
        raise UserError(
            f"{socket.gethostname()} cannot reach rank 0 at {host}:{port}: {error}"
        ) from error


def _read(file: Path) -> tuple[str, int]:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        os.listdir(file.parent)  # NFS remembers for a minute that a file was not there
        if file.is_file():
            host, port = file.read_text(encoding="utf-8").split()
            return host, int(port)
        time.sleep(0.1)
    raise UserError(
        f"{socket.gethostname()} sees no {file} after {PATIENCE_SECONDS} s: rank 0 did not start, "
        "or the run folder is on no file system that all nodes share"
    )
