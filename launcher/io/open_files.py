"""How many files this process may have open. A socket counts as one: gloo connects every rank with
every other rank, once for each of its groups.

Imports no torch.
"""

from __future__ import annotations

import os
import resource

from launcher.errors import UserError

# Enough for ten thousand ranks. Some hard limits are a billion, and programs exist that allocate a
# table of that size.
ENOUGH = 1 << 16
OWN_FILES = 256  # libraries, logs, data, checkpoints, devices


def needed(ranks: int, groups: int = 1) -> int:
    """Files and sockets that a rank has open; rank 0 also serves the key-value store."""
    return (groups + 1) * (ranks - 1) + OWN_FILES


def raise_limit(ranks: int, groups: int = 1) -> None:
    """Raise this process's limit of open files to the hard limit, or to `ENOUGH`.

    Raises UserError if `ranks` that gloo connects in `groups` groups will pass the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    count = needed(ranks, groups)
    if soft != resource.RLIM_INFINITY and soft < count and allowed < count:
        raise UserError(
            f"{ranks} ranks need about {count:,} open files each (a socket for every other rank), "
            f"and a process on {os.uname().nodename} may open {allowed:,} (ulimit -Hn): raise the "
            "hard limit (LimitNOFILE= of slurmd, docker run --ulimit nofile=65536), or use fewer "
            "ranks"
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
