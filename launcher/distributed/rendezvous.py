"""How the ranks find each other: the key-value store of the launch. Imports torch only when used.

torchrun shares its agent's store with its ranks. If every node of a Slurm job has its own agent,
rank 0 serves a store and writes its addresses to a file in the attempt's folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UserError
from launcher.folders import manifest
from launcher.io import network

if TYPE_CHECKING:
    import torch.distributed as dist

CONNECT_SECONDS = 20  # to a server that is known to listen
PROBE_SECONDS = 3  # to one of several addresses
POLL_SECONDS = 1.0  # between two checks whether another round has begun
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Meeting:
    """Where rank 0's store is, as the file in the attempt's folder says."""

    host: str
    machine: str  # of `network.machine_id`
    port: int
    addresses: list[str]  # that other machines may reach
    name: str  # of the store, in one of its keys


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

    uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, host, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    # An agent serves its store before it starts ranks: if nobody answers, it has been killed.
    if uses_agent or rank != "0":
        _wait_for_answer(host, int(port), CONNECT_SECONDS if uses_agent else 60 * minutes)
    try:
        store: dist.Store = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))[0]
    except dist.DistError as error:
        raise _no_store(host, int(port), str(error)) from error
    store.set_timeout(dist.default_pg_timeout)
    return store


def _wait_for_answer(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens at HOST:PORT. Raises UserError if nobody does within `seconds`.

    torch's own client would print the frames of its C++ for each attempt.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            left = max(POLL_SECONDS, end - time.monotonic())
            socket.create_connection((host, port), timeout=left).close()
            return
        except (OSError, UnicodeError, OverflowError) as error:
            if time.monotonic() + POLL_SECONDS > end:
                raise _no_store(host, port, f"{error}") from error
        time.sleep(POLL_SECONDS)


def _no_store(host: str, port: int, reason: str) -> UserError:
    """`reason`: of the system, or of torch with frames of its C++ in further lines."""
    reason, _, _ = reason.partition("\n")
    return UserError(
        f"{socket.gethostname()} finds no store of the ranks at {host}:{port}: "
        f"{reason}; rank 0 or its torchrun has ended, or this machine cannot reach "
        "it. If torchrun has not started this command, its variables are left over → "
        "env -u TORCHELASTIC_RUN_ID shardway …"
    )


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
    """The store of a job on several nodes. Rank 0 binds a free port and writes its addresses to
    `file`, where the other ranks read them. Sets MASTER_ADDR to the one that answers.

    Raises UserError if the file does not appear, or if no address can be reached.
    """
    import torch.distributed as dist

    if os.environ["RANK"] == "0":
        # By loopback: the own name may not resolve. The store listens at every address.
        store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        name = uuid.uuid4().hex
        store.set(f"shardway/store/{name}", "")
        meeting = Meeting(
            socket.gethostname(),
            network.machine_id(),
            store.port,
            network.reachable_addresses(),
            name,
        )
        manifest.write_text(file, f"{json.dumps(asdict(meeting))}\n")
        os.environ["MASTER_ADDR"] = LOOPBACK
        return store
    meeting = _wait_for_address(file, minutes)
    addresses = _addresses_of(meeting)
    end, reason = time.monotonic() + CONNECT_SECONDS, "its name has no address here"
    while addresses and time.monotonic() < end:
        for address in addresses:
            try:
                socket.create_connection((address, meeting.port), timeout=PROBE_SECONDS).close()
                store = dist.TCPStore(address, meeting.port, is_master=False)
            except (OSError, dist.DistError) as error:
                reason = str(error)
                continue
            # A bridge of containers has the same address on many machines.
            if store.check([f"shardway/store/{meeting.name}"]):
                os.environ["MASTER_ADDR"] = address
                return store
            reason = f"{address} is another machine"
        time.sleep(POLL_SECONDS)
    raise _no_store(" or ".join([meeting.host, *addresses]), meeting.port, reason)


def _addresses_of(meeting: Meeting) -> list[str]:
    """Where rank 0's store may be reached from this machine, the likeliest first."""
    if meeting.machine == network.machine_id():
        return [LOOPBACK]
    known = [*network.resolve(meeting.host), *meeting.addresses]
    return [each for each in dict.fromkeys(known) if not network.is_loopback(each)]


def _wait_for_address(file: Path, minutes: float) -> Meeting:
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        os.listdir(file.parent)  # NFS caches for a minute that a file did not exist
        if file.is_file():
            return Meeting(**json.loads(file.read_text(encoding="utf-8")))
        time.sleep(0.1)
    raise UserError(
        f"{file} did not appear on {socket.gethostname()} within {minutes:g} minutes "
        "(launch.rendezvous_minutes): rank 0 did not start, or the run folder is not on a file "
        "system that all nodes share"
    )
