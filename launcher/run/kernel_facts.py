"""What the kernel says about a process and what it has started. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
SLEEPING, DISK, STOPPED = "S", "D", "tT"


@dataclass(frozen=True)
class Activity:
    """How much a process has done until now, with its descendants."""

    state: str  # of the process, as /proc/PID/stat has it: R, S, D, T …; "R" if any of them runs
    seconds: float  # of processor time
    nbytes: int  # read and written
    faults: int  # pages that had to be read from a disk

    def is_idle_since(self, earlier: Activity, elapsed: float) -> bool:
        """Whether it has done next to nothing in the `elapsed` seconds since `earlier`."""
        return (
            self.state != "R"
            and self.seconds - earlier.seconds < 0.05 * elapsed + 1.5 / TICKS
            and self.nbytes - earlier.nbytes < 16_384 * elapsed
            and self.faults - earlier.faults < 2
        )


def activity(pid: int) -> Activity | None:
    """None if the process has ended."""
    own = _stat(pid)
    if own is None:
        return None
    state, seconds, faults = own
    nbytes = _bytes(pid)
    for child in descendants(pid):
        if (one := _stat(child)) is not None:
            state = "R" if one[0] == "R" and state not in STOPPED else state
            seconds, faults, nbytes = seconds + one[1], faults + one[2], nbytes + _bytes(child)
    return Activity(state, seconds, nbytes, faults)


def _stat(pid: int) -> tuple[str, float, int] | None:
    """State, processor time with that of ended children, and page faults that read from a disk.
    "R" if one of its threads runs."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    if state in "ZX":
        return None
    if state not in STOPPED and state != "R" and _has_running_thread(pid):
        state = "R"
    return state, sum(map(int, fields[10:14])) / TICKS, int(fields[8])


def _has_running_thread(pid: int) -> bool:
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                text = (thread / "stat").read_text(encoding="utf-8", errors="replace")
                if text.rpartition(")")[2].split()[0] == "R":
                    return True
    return False


def _bytes(pid: int) -> int:
    with suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
        values = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
        return values["rchar"] + values["wchar"] + values["read_bytes"]
    return 0


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have started."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found + [each for child in found for each in descendants(child)]


def wait_text(pid: int) -> str:
    """Where the process waits in the kernel, as far as this user may know."""
    lines = []
    for name in ("wchan", "syscall", "stack"):
        with suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
            if text.strip("0 \n"):
                lines.append(f"{name}: {text.strip()}")
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        lines += [line for line in status.splitlines() if line.startswith(("State:", "VmRSS:"))]
    return "\n".join(lines)
