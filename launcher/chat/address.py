"""Addresses that a server can listen on. Imports no torch."""

from __future__ import annotations

import ipaddress
import socket

from launcher.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(host: str, port: int) -> None:
    """Raises UserError if no server can listen on `host` and `port` now."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, ValueError) as error:  # ValueError: not a valid host name
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"cannot listen on --host {host} --port {port} ({reason}); choose another --port or "
            "--host"
        ) from error
