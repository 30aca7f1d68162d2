"""A run that faults are injected into: its processes, its progress, and its checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.folders.checkpoint import Checkpoint, finished_checkpoints
from launcher.folders.run import RunDir
from launcher.run.metrics import parse_record

POLL_SECONDS = 0.02
LAST_LINES = 20
PATIENCE_SECONDS = 300.0  # for any one thing to happen

# A network of its own, so that it can be cut.
IN_ITS_NETWORK = ("unshare", "-n", "bash", "-c", 'ip link set lo up && exec "$@"', "-")


class Stuck(Exception):
    """Something that should happen has not happened."""


@dataclass(frozen=True)
class Mark:
    """How far a run was at one moment."""

    step: int
    attempt: int
    wall: float  # seconds since 1970


class DemoRun:
    """One training run in `folder`, started by `shardway train` as often as needed."""

    def __init__(self, folder: Path, words: list[str], own_network: bool) -> None:
        self.folder, self.words, self.own_network = folder, words, own_network
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def output(self) -> Path:
        """What all its launchers have printed."""
        return self.folder.with_suffix(".txt")

    def last_words(self) -> str:
        """The end of what its launchers have printed."""
        return "\n".join(_text(self.output).splitlines()[-LAST_LINES:])

    @property
    def run(self) -> RunDir:
        """At its newest attempt."""
        return RunDir(self.folder).newest_attempt()

    def command(self) -> list[str]:
        """What starts or continues it."""
        prefix = IN_ITS_NETWORK if self.own_network else ()
        words = [*self.words, f"run_dir={self.folder}", "resume=auto"]
        return [*prefix, sys.executable, "-m", "launcher.cli", "train", *words]

    def start(self) -> None:
        """Start the launcher."""
        self.starts += 1
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ},  # more stand in each other's way
            )

    def has_ended(self) -> bool:
        """Whether the launcher has."""
        return self.process is None or self.process.poll() is not None

    @property
    def launcher(self) -> int:
        assert self.process is not None
        return self.process.pid

    def rank(self, number: int) -> int:
        """The process of a rank of the newest attempt."""
        return int(self._record(number)["pid"])

    def agent(self) -> int:
        """torchrun's agent of the newest attempt."""
        return int(self._record(0)["agent"])

    def ranks(self) -> list[int]:
        files = self.run.log_files("rank-*.process.json")
        return [int(json.loads(file.read_text())["pid"]) for file in files]

    def _record(self, rank: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.run.rank_process(rank).read_text())
        return content

    def records(self) -> list[dict[str, Any]]:
        """The steps in metrics.jsonl."""
        if not self.run.metrics.is_file():
            return []
        lines = self.run.metrics.read_bytes().splitlines()
        return [each for each in map(parse_record, lines) if each is not None and "loss" in each]

    def step(self) -> int:
        """The last step that is logged."""
        records = self.records()
        return int(records[-1]["step"]) if records else 0

    def mark(self) -> Mark:
        return Mark(self.step(), self.run.attempt, time.time())

    def checkpoints(self) -> list[Checkpoint]:
        """The newest first."""
        return finished_checkpoints(self.run.checkpoints)

    def wait_for_steps(self, steps: int) -> None:
        """Wait until `steps` more have been trained by the newest attempt. Raises Stuck."""
        begin = time.time()
        wait_until(lambda: self._trained_since(begin) >= steps or self.has_ended(), "no step")
        if self.has_ended():
            raise Stuck(f"the run has ended: {self.last_words()}")

    def _trained_since(self, wall: float) -> int:
        return sum(record["time"] > wall for record in self.records())

    def has_noticed(self, before: Mark) -> bool:
        """Whether the attempt of `before` has ended, for whoever looks."""
        attempt = RunDir(self.folder, before.attempt)
        return (
            self.has_ended()
            or self.run.attempt > before.attempt
            or attempt.status.is_file()
            or f'"attempt": {before.attempt},' in _text(attempt.failures)
        )

    def first_step_after(self, before: Mark, survives: bool) -> int | None:
        """The first step that was trained after `before`, by another attempt unless the fault is
        one that the attempt `survives`; None if there is none yet."""
        if survives:
            later = [r for r in self.records() if r["time"] > before.wall + 0.1]
        elif self.run.attempt == before.attempt or not self.run.steps.is_file():
            return None
        else:
            begun = self.run.steps.stat().st_mtime  # metrics.jsonl is then as it was saved
            later = [r for r in self.records() if r["time"] > begun]
        return int(later[0]["step"]) if later else None

    def stop(self) -> None:
        """Ask the run to save and end, and wait for it."""
        self.run.stop.touch()
        assert self.process is not None
        self.process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        """End whatever is left of it."""
        for pid in [self.process.pid if self.process else 0, *self.ranks()]:
            if pid:
                signal_process(pid, signal.SIGCONT)
                signal_process(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""


def signal_process(pid: int, number: int) -> None:
    """Signal a process, which may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(condition: Any, what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Poll. Raises Stuck after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Stuck(f"{what} within {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
