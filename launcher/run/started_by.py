"""Whether torchrun's agent has started this process as a rank. Imports no torch.

torchrun describes a rank in environment variables, which all that the rank starts inherits: a shell
or a notebook, and what is typed there. A profile or an image can set them, too. So the process
tree counts: an agent starts each rank in a session of its own, and has loaded torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

# What torchrun sets and a rank reads.
RANK_VARIABLES = (
    *("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
PROC = Path("/proc")
SHELLS = ("bash", "dash", "fish", "ksh", "sh", "tcsh", "zsh")


def is_rank() -> bool:
    """Whether torchrun started this process. Some of the variables alone are left over from
    something else, and no rank of this launch gets them."""
    return why_no_rank() is None


def why_no_rank() -> str | None:
    """Why this process is not a rank of torchrun; None if it is one."""
    if missing := [name for name in RANK_VARIABLES if name not in os.environ]:
        return f"not {', '.join(missing)}"
    leader = os.getsid(0)
    agent = _parent(leader)
    if not agent:  # outside of this container: its variables are all that is known
        return None
    if not _may_be_agent(agent):
        return f"process {agent}, which started this session, is not torchrun"
    if shell := next(filter(_reads_a_terminal, _ancestors(leader)), None):
        return f"process {shell}, in which this was typed, is a shell that torchrun started"
    return None


def _may_be_agent(pid: int) -> bool:
    """Whether a process has torch and another place among ranks than this one. An agent that is
    itself a rank of an outer launch has other variables than its own ranks."""
    folder = PROC / str(pid)
    try:
        if folder.stat().st_uid != os.geteuid():
            return False
        has_torch = b"/libtorch" in (folder / "maps").read_bytes()
        inherited = (folder / "environ").read_bytes().split(b"\0")
    except FileNotFoundError:  # it has ended, or belongs to a user who is hidden
        return False
    except OSError:  # this system shows no process to another
        return True
    ours = {os.fsencode(f"{name}={os.environ[name]}") for name in RANK_VARIABLES}
    return has_torch and not ours <= set(inherited)


def _ancestors(leader: int) -> list[int]:
    """The processes between this one and `leader`, the first of its session, inclusive."""
    found, pid = [], os.getpid()
    while pid not in (0, leader):
        pid = _parent(pid)
        found.append(pid)
    return found


def _reads_a_terminal(pid: int) -> bool:
    """Whether a process is a shell that was given neither a script nor a command."""
    try:
        name, *words = (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")[:-1]
    except (OSError, ValueError):
        return False
    is_given_work = any(re.match(r"[^-]|-[A-Za-z]*c", word) for word in words)
    return Path(name.removeprefix("-")).name in SHELLS and not is_given_work


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it has none that can be seen here."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])  # the name before it may contain anything
