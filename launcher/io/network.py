"""This machine in the network: its interfaces, what names resolve to, and which way packets leave.

Imports no torch.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil

FAMILIES = (socket.AF_INET, socket.AF_INET6)
ANY_PORT = 9  # no packet is sent to it


def machine_id() -> str:
    """Two processes with the same one reach each other over the loopback interface."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def interfaces() -> dict[str, list[str]]:
    """Name → IP addresses of the interfaces that are up, without link-local addresses."""
    states, found = psutil.net_if_stats(), {}
    for name, entries in psutil.net_if_addrs().items():
        known = [
            each.address for each in entries if each.family in (socket.AF_INET, socket.AF_INET6)
        ]
        usable = [each for each in known if not ipaddress.ip_address(each).is_link_local]
        if usable and name in states and states[name].isup:
            found[name] = usable
    return found


def resolve(host: str) -> list[str]:
    """The IP addresses of `host`, each once; empty if its name does not resolve."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def is_loopback(address: str) -> bool:
    """Whether it reaches only the own machine."""
    return ipaddress.ip_address(address).is_loopback


def reachable_addresses() -> list[str]:
    """This machine's addresses that another machine may reach: first what its name resolves to."""
    named = resolve(socket.gethostname())
    others = [each for known in interfaces().values() for each in known]
    return [each for each in dict.fromkeys([*named, *others]) if not is_loopback(each)]


def route_to(host: str) -> str:
    """The own address from which packets to `host` leave; empty if the kernel has no route."""
    for address in resolve(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, ANY_PORT))  # of a datagram socket: asks only for the route
            return str(probe.getsockname()[0])
    return ""
