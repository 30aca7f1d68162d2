"""Shared code of the command benchmarks: start a command, watch it, end it after enough output."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

Family = list[psutil.Process]  # a process and all its descendants


def watch(
    words: list[str],
    environment: dict[str, str],
    folder: Path,
    enough: Callable[[Family], bool],
    seconds: float,
) -> int | None:
    """Run a command in `folder`, with its output in log.txt there, until `enough` returns True
    (called ten times per second) or `seconds` have passed.

    Returns its exit status if it ended by itself, otherwise None.
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
    """The peak resident set in bytes, from the kernel, of the process that needed most."""
    return max(map(_peak, family), default=0)


def _peak(process: psutil.Process) -> int:
    with suppress(OSError):  # it has ended
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def _end(family: Family) -> None:
    """Kill all at once: saving is not compared. Parents first: they report dead children."""
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=30)
