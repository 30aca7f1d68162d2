"""What becomes of a process whose parent is killed. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal

import launcher

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_when_parent_dies(number: int) -> None:
    """Have the kernel send this process the signal `number` when its parent has died."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def die_with_agent() -> None:
    """End this rank when its agent is killed, which cannot end its ranks then.

    The kernel does that from now on. Until now the agent may have died already: then this process
    has another parent than it was started by.
    """
    signal_when_parent_dies(signal.SIGKILL)
    agent = os.environ.get("SHARDWAY_AGENT", str(launcher.PARENT))
    if str(os.getppid()) != agent:
        os._exit(1)
