"""The network interface by which the ranks of several machines reach each other.

gloo publishes the address that the machine's own name resolves to. Debian's installer writes
127.0.1.1 there: the other machines would connect to themselves. NCCL takes the first interface that
it finds. So each machine uses the interface that reaches rank 0, as its kernel routes, and the
machine of rank 0 the one that reaches the next machine.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

from launcher.distributed.agreement import agree
from launcher.errors import UserError
from launcher.io.network import interfaces, is_loopback, machine_id, route_to

AUTO = "auto"
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
NAMED = 4  # machines that the log names


@dataclass(frozen=True)
class Link:
    """How one rank takes part in the network."""

    host: str  # its machine, as it calls itself
    machine: str  # of `machine_id`
    interface: str = ""  # empty: all ranks are on one machine, and nothing was chosen
    address: str = ""  # of that interface
    problem: str = ""


def settle(
    store: dist.Store,
    rank: int,
    world_size: int,
    asked: str,
    minutes: float,
    log: Callable[[str], None],
) -> list[Link]:
    """Choose the interface of this rank (`asked`: cluster.interface), and tell gloo and NCCL. The
    environment must name rank 0's address, as this machine knows it, in MASTER_ADDR.

    Returns the links of all ranks, in order. On one machine nothing is changed unless an interface
    is `asked`. Raises UserError on all ranks, with the machines' names, if one cannot be used.
    """

    def exchange(topic: str, own: Link, decide: Callable[[list[str]], str]) -> list[Link]:
        said = json.dumps(asdict(own))
        text = agree(store, rank, world_size, topic, said, decide, minutes)
        return [Link(**each) for each in json.loads(text)]

    main = os.environ["MASTER_ADDR"]
    own = Link(socket.gethostname(), machine_id(), address="" if rank == 0 else route_to(main))
    seen = exchange("machines", own, _join)
    elsewhere = [each for each in seen if each.machine != own.machine]
    towards = main
    if own.machine == seen[0].machine:  # the kernel routes to itself over loopback
        towards = next((each.address for each in elsewhere if each.address), "")
    try:
        chosen = choose(own, asked, towards, several=bool(elsewhere))
    except UserError as error:
        chosen = Link(own.host, own.machine, problem=str(error))
    links = exchange("interfaces", chosen, _join_without_problems)
    _set_variables(chosen.interface)
    if line := describe(links):
        log(line)
    return links


def _join(said: list[str]) -> str:
    return json.dumps([json.loads(each) for each in said])


def _join_without_problems(said: list[str]) -> str:
    problems = dict.fromkeys(link["problem"] for link in map(json.loads, said) if link["problem"])
    if problems:
        raise UserError("\n".join(problems))
    return _join(said)


def choose(own: Link, asked: str, towards: str, several: bool) -> Link:
    """The link of a rank whose machine is `own`. `towards`: an address on another machine, if there
    are `several`.

    Raises UserError if the interface does not exist, or if no other machine is reached through it.
    """
    set_by_user = os.environ.get(GLOO, "")
    if asked != AUTO and set_by_user not in ("", asked):
        raise UserError(
            f"cluster.interface={asked}, but {own.host} has {GLOO}={set_by_user} in its "
            f"environment → unset {GLOO}, or cluster.interface=auto, which keeps it"
        )
    name, key = (asked, "cluster.interface") if asked != AUTO else (set_by_user, GLOO)
    if not name:
        return _choose_by_route(own, towards) if several else Link(own.host, own.machine)
    existing = interfaces()
    for each in name.split(","):
        if each not in existing:
            listed = ", ".join(f"{other} ({known[0]})" for other, known in existing.items())
            raise UserError(
                f"{key}={name}: {own.host} has no interface {each} that is up, only {listed} → one "
                f"of these, or {_to_auto(key)}"
            )
    address = existing[name.split(",")[0]][0]
    if several and is_loopback(address):
        raise UserError(
            f"{key}={name}: other machines cannot reach {own.host} at {address} → {_to_auto(key)}"
        )
    return Link(own.host, own.machine, name, address)


def _to_auto(key: str) -> str:
    return f"unset {GLOO}" if key == GLOO else "cluster.interface=auto"


def _choose_by_route(own: Link, towards: str) -> Link:
    address = route_to(towards) if towards else ""
    by_address = {each: name for name, known in interfaces().items() for each in known}
    if not address or is_loopback(address) or address not in by_address:
        known = ", ".join(f"{name} ({each})" for each, name in by_address.items())
        raise UserError(
            f"{own.host} has no route to the other machines"
            f"{f' at {towards}' if towards else ''}; its interfaces: {known or 'none'} → "
            "cluster.interface=NAME, or a name of rank 0's machine that resolves everywhere"
        )
    return Link(own.host, own.machine, by_address[address], address)


def _set_variables(interface: str) -> None:
    if not interface:
        return
    os.environ.setdefault(GLOO, interface)
    # NCCL itself prefers InfiniBand, whose sockets are faster than those of the chosen interface.
    has_infiniband = any(name.startswith("ib") for name in interfaces())
    if not has_infiniband or interface.startswith("ib"):
        names = f"={interface}"  # without the sign, a name would be the beginning of names
        os.environ.setdefault(NCCL, names)


def describe(links: list[Link]) -> str:
    """A log line about the interfaces of several machines; empty if nothing was chosen."""
    by_machine = {link.machine: link for link in links if link.interface}
    if not by_machine:
        return ""
    names = " and ".join(dict.fromkeys(link.interface for link in by_machine.values()))
    if len(by_machine) > NAMED:
        return f"network: {names} on {len(by_machine)} machines"
    listed = ", ".join(f"{link.host} {link.address}" for link in by_machine.values())
    return f"network: {names} ({listed})"
