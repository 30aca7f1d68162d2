"""What the benchmarks of whole commands share: start one, look on, end it when enough is seen."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

Family = list[psutil.Process]  # a process, and all that it has started


def watch(
    words: list[str],
    environment: dict[str, str],
    folder: Path,
    enough: Callable[[Family], bool],
    seconds: float,
) -> int | None:
    """Run a command in `folder`, its output in log.txt there, until `enough` of it is seen (asked
    ten times a second) or `seconds` are over.

    Returns its exit status if it has ended by itself, else None.
    """
    began = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = psutil.Popen(
            words, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    family: Family = [process]
    try:
        while (status := process.poll()) is None and time.monotonic() - began < seconds:
            with suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
            if enough(family):
                break
            time.sleep(0.1)
    finally:
        _end(family)
    return None if status is None else int(status)


def peak_rss(family: Family) -> int:
    """The peak resident set in bytes of the process that needed most, as the kernel keeps it."""
    return max(map(_peak, family), default=0)


def _peak(process: psutil.Process) -> int:
    with suppress(OSError):  # it has ended
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def _end(family: Family) -> None:
    """At once: saving is not compared. Parents first, for they report a child's end."""
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=30)
