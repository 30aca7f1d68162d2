"""How the ranks find each other: the key-value store of the launch. Imports torch only when used.

torchrun shares its agent's store with its ranks. If every node of a Slurm job has its own agent,
rank 0 serves a store and writes its address to a file in the attempt's folder.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UserError
from launcher.folders import manifest

if TYPE_CHECKING:
    import torch.distributed as dist

TIMEOUT_SECONDS = 300


def set_global_ranks() -> None:
    """Replace torchrun's rank and world size, which count this node only, with those of the job."""
    nodes, node = int(os.environ["SHARDWAY_NODES"]), int(os.environ["SHARDWAY_NODE"])
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ["RANK"] = str(node * per_node + int(os.environ["LOCAL_RANK"]))
    os.environ["WORLD_SIZE"] = str(nodes * per_node)


def open_store() -> dist.Store:
    """The key-value store of this launch. Call it once per process.

    Raises UserError if rank 0's store cannot be reached.
    """
    if "SHARDWAY_RENDEZVOUS" in os.environ:
        return join_store(Path(os.environ["SHARDWAY_RENDEZVOUS"]))
    import torch.distributed as dist

    store: dist.Store = next(dist.rendezvous("env://"))[0]
    return store


def join_store(file: Path) -> dist.Store:
    """The store of a job on several nodes. Rank 0 binds a free port and writes its address to
    `file`, where the other ranks read it.

    Raises UserError if the file does not appear, or if the address cannot be reached.
    """
    import torch.distributed as dist

    if os.environ["RANK"] == "0":
        host = socket.gethostname()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        manifest.write_text(file, f"{host} {store.port}\n")
        return store
    host, port = _wait_for_address(file)
    try:
        return dist.TCPStore(host, port, is_master=False)
    except dist.DistError as error:
        raise UserError(
            f"{socket.gethostname()} cannot reach rank 0 at {host}:{port}: {error}"
        ) from error


def _wait_for_address(file: Path) -> tuple[str, int]:
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        os.listdir(file.parent)  # NFS caches for a minute that a file did not exist
        if file.is_file():
            host, port = file.read_text(encoding="utf-8").split()
            return host, int(port)
        time.sleep(0.1)
    raise UserError(
        f"{file} did not appear on {socket.gethostname()} within {TIMEOUT_SECONDS} s: rank 0 did "
        "not start, or the run folder is not on a file system that all nodes share"
    )
