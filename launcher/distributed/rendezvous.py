"""How the ranks find each other: the key-value store of the launch. Imports torch only when used.

torchrun shares its agent's store with its ranks. If every node of a Slurm job has its own agent,
rank 0 serves a store and writes its address to a file in the attempt's folder.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UserError
from launcher.folders import manifest

if TYPE_CHECKING:
    import torch.distributed as dist

CONNECT_SECONDS = 60
POLL_SECONDS = 1.0  # between two checks whether another round has begun


def set_global_ranks() -> None:
    """Replace torchrun's rank and world size, which count this node only, with those of the job."""
    nodes, node = int(os.environ["SHARDWAY_NODES"]), int(os.environ["SHARDWAY_NODE"])
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ["RANK"] = str(node * per_node + int(os.environ["LOCAL_RANK"]))
    os.environ["WORLD_SIZE"] = str(nodes * per_node)


def open_store(minutes: float) -> dist.Store:
    """The key-value store of this launch. Call it once per process.

    Raises UserError if rank 0's store cannot be reached, which may take `minutes` to appear.
    """
    if "SHARDWAY_RENDEZVOUS" in os.environ:
        return join_store(Path(os.environ["SHARDWAY_RENDEZVOUS"]), minutes)
    import torch.distributed as dist

    store: dist.Store
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        store = next(dist.rendezvous("env://"))[0]
        return store
    # An agent serves its store before it starts ranks: if nobody answers, it has been killed.
    try:
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=CONNECT_SECONDS)))[0]
    except dist.DistError as error:
        raise UserError(f"torchrun's agent does not answer; it may have ended: {error}") from error
    store.set_timeout(dist.default_pg_timeout)
    return store


def enter_round(store: dist.Store, rank: int, world_size: int, minutes: float) -> dist.Store:
    """A part of `store` without the keys of earlier rounds.

    When torchrun restarts ranks (`--max-restarts`), they find the keys of the ranks before them in
    its store, and no variable has a number of the round that all agents agree on: an agent that
    restarts because another one did counts no restart. So rank 0 chooses a name, and another rank
    accepts it only once rank 0 has answered: the rank 0 of an earlier round is dead by then.

    Raises UserError on a rank that waits in vain for `minutes`.
    """
    import torch.distributed as dist

    if rank == 0:
        name = uuid.uuid4().hex
        store.set("shardway/round", name)
        wait_for_ranks(store, [f"{name}/{other}" for other in range(1, world_size)], minutes)
        for other in range(1, world_size):
            guest = store.get(f"{name}/{other}").decode()
            store.set(f"{name}/{other}/{guest}", "")
        return dist.PrefixStore(name, store)
    end, guest = time.monotonic() + 60 * minutes, uuid.uuid4().hex
    while time.monotonic() < end:
        wait_for_ranks(store, ["shardway/round"], minutes)
        name = store.get("shardway/round").decode()
        store.set(f"{name}/{rank}", guest)
        try:
            store.wait([f"{name}/{rank}/{guest}"], timedelta(seconds=POLL_SECONDS))
            return dist.PrefixStore(name, store)
        except dist.DistStoreError:
            continue  # of an earlier round, or rank 0 still waits for others
    raise UserError(
        f"rank 0 has not answered rank {rank} within {minutes:g} minutes "
        "(launch.rendezvous_minutes); the output of another rank shows why, or its torchrun was "
        "not started"
    )


def wait_for_ranks(store: dist.Store, keys: list[str], minutes: float) -> None:
    """Wait until all `keys` are set, each by the rank that its last part names.

    Raises UserError with the ranks that have not answered within `minutes`.
    """
    import torch.distributed as dist

    try:
        store.wait(keys, timedelta(minutes=minutes))
    except dist.DistStoreError as error:
        missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
        ranks = ", ".join(name for name in missing if name.isdecimal()) or "0"
        raise UserError(
            f"no answer from rank {ranks} within {minutes:g} minutes "
            "(launch.rendezvous_minutes); its own output shows why, or its torchrun was not started"
        ) from error


def join_store(file: Path, minutes: float) -> dist.Store:
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
    host, port = _wait_for_address(file, minutes)
    try:
        return dist.TCPStore(host, port, is_master=False)
    except dist.DistError as error:
        raise UserError(
            f"{socket.gethostname()} cannot reach rank 0 at {host}:{port}: {error}"
        ) from error


def _wait_for_address(file: Path, minutes: float) -> tuple[str, int]:
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        os.listdir(file.parent)  # NFS caches for a minute that a file did not exist
        if file.is_file():
            host, port = file.read_text(encoding="utf-8").split()
            return host, int(port)
        time.sleep(0.1)
    raise UserError(
        f"{file} did not appear on {socket.gethostname()} within {minutes:g} minutes "
        "(launch.rendezvous_minutes): rank 0 did not start, or the run folder is not on a file "
        "system that all nodes share"
    )
