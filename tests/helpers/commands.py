"""Run the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import cli

SHARDWAY = (sys.executable, "-m", "launcher.cli")
SHORT = ("training.epochs=null", "training.max_steps=4")
LONG = ("training.epochs=null", "training.max_steps=100000")
PATIENCE_SECONDS = 300  # a deadline for a busy machine: no normal wait takes that long
TRAIN_TINY = ("train", "model=tiny", "cluster.cpu_processes=2", "tracking.plot=false")


def shardway(
    *words: object, cwd: Path, patience: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run one `shardway …` to its end."""
    command = [*SHARDWAY, *map(str, words)]
    return run(command, cwd, patience)


def run(
    command: list[str], cwd: Path, patience: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=patience)


def in_process(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run one `shardway …` in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["shardway", *words])
    try:
        cli.run_command()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """Start one `shardway …` in its own process group, as a terminal does."""
    return subprocess.Popen(
        [*SHARDWAY, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Poll while `process` is alive."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"waited for {PATIENCE_SECONDS} s"
        time.sleep(0.05)


def wait_for_training(process: subprocess.Popen[str], folder: Path) -> None:
    wait_until(process, lambda: (folder / "metrics.jsonl").is_file() and losses(folder) != [])


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names `folder`: the agent and the ranks of a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found += [process.pid] * any(str(folder) in word for word in words)
    return found


def wait_until_none_is_left(folder: Path) -> None:
    """Wait until the processes of the run in `folder` end: they can outlive their parent."""
    end = time.monotonic() + PATIENCE_SECONDS
    while left := processes_of(folder):
        assert time.monotonic() < end, f"{left} still run"
        time.sleep(0.05)


def the_agent(folder: Path) -> psutil.Process:
    """The torchrun agent of a run."""
    return _only(folder, lambda process: "launcher.cluster.agent" in process.cmdline())


def the_rank(folder: Path, rank: int) -> psutil.Process:
    """One rank of a run."""
    return _only(folder, lambda process: process.environ().get("RANK") == str(rank))


def _only(folder: Path, is_it: Callable[[psutil.Process], bool]) -> psutil.Process:
    (found,) = filter(is_it, map(psutil.Process, processes_of(folder)))
    return found


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(run_folder) if "loss" in record]


def status(run_folder: Path, attempt: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (run_folder / f"logs/attempt-{attempt}/status.json").read_text()
    )
    return found
