"""Processes that the page starts and that do not depend on it. Their output goes to a file.

Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.json_file import is_count
from launcher.ui.roots import Roots

FOLDER = ".page"  # in runs/: a record and the output of each job
TAIL_BYTES = 1 << 16
# -P: do not import modules from the current folder.
SHARDWAY = (sys.executable, "-P", "-m", "launcher.cli")


@dataclass(frozen=True)
class Job:
    """A process, identified by its files: `NAME.json`, `NAME.log`, and `NAME.out` if its stdout is
    separate. The server that started it may have ended."""

    roots: Roots
    folder: Path
    name: str

    @property
    def log(self) -> Path:
        """The file with its output."""
        return self.folder / f"{self.name}.log"

    @property
    def out(self) -> Path:
        """The file with its stdout, if that is separate."""
        return self.folder / f"{self.name}.out"

    @property
    def record(self) -> Path:
        """A JSON file with its arguments, its process ID and its creation time."""
        return self.folder / f"{self.name}.json"

    @property
    def is_running(self) -> bool:
        """Whether this process, and not another one with the same ID, is running."""
        if (record := self._read_record()) is None:
            return False
        try:
            process = psutil.Process(record["pid"])
            return (
                process.create_time() == record["created"]
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False

    def stop(self) -> None:
        """Send SIGTERM if the process is running."""
        if self.is_running and (record := self._read_record()):
            with suppress(ProcessLookupError):
                os.kill(record["pid"], signal.SIGTERM)

    def log_tail(self) -> str:
        """The end of its log."""
        return tail(self.roots, self.log)

    def _read_record(self) -> dict[str, Any] | None:
        """The content of `record`; None if there is none, or what is there is none."""
        try:
            with self.roots.open(self.record) as file:
                record = json.load(file)
        except (OSError, ValueError, RecursionError, UserError):
            return None
        is_record = isinstance(record, dict) and is_count(record.get("pid"))
        return record if is_record and "created" in record else None


@dataclass
class Jobs:
    """Starts jobs, and reaps those that end while the server runs."""

    roots: Roots
    command: tuple[str, ...] = SHARDWAY
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder with the files of all jobs."""
        return self.roots.runs / FOLDER

    def job(self, name: str) -> Job:
        """The job with this name, whether or not it was ever started."""
        return Job(self.roots, self.folder, name.replace("/", "+"))

    def start(self, name: str, arguments: list[str], separate_stdout: bool = False) -> Job:
        """Run `shardway ARGUMENTS` in the first root.

        The process has its own session: neither the end of this server nor Ctrl-C reaches it.
        `separate_stdout` writes stdout to its own file instead of the log. Raises UserError while a
        job with this name is running.
        """
        with self._lock:
            return self._start(self.job(name), arguments, separate_stdout)

    def _start(self, job: Job, arguments: list[str], separate_stdout: bool) -> Job:
        if job.is_running:
            raise UserError(f"{job.name} is still running → wait until it has ended")
        self.roots.to_write(job.folder).mkdir(parents=True, exist_ok=True)
        self.reap()
        with ExitStack() as files:
            log = files.enter_context(
                self.roots.open(job.log, writing=separate_stdout, append=not separate_stdout)
            )
            out = (
                files.enter_context(self.roots.open(job.out, writing=True))
                if separate_stdout
                else log
            )
            process = subprocess.Popen(
                [*self.command, *arguments],
                cwd=self.roots.home,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._started.append(process)
        record = {"words": arguments, "pid": process.pid, "created": _create_time(process.pid)}
        manifest.write_json(job.record, record)
        return job

    def run(self, arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run `shardway ARGUMENTS` and wait for its end.

        Raises UserError with its error message if it fails, and if it takes more than `timeout`
        seconds.
        """
        try:
            done = subprocess.run(
                [*self.command, *arguments],
                cwd=self.roots.home,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"shardway {arguments[0]} took more than {timeout:.0f} s") from error
        if done.returncode:
            raise UserError(done.stderr.strip()[-2000:] or f"ended with {done.returncode}")
        return done

    def reap(self) -> None:
        """Reap the processes that have ended."""
        self._started = [process for process in self._started if process.poll() is None]


def _create_time(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:  # it has already ended
        return None


def tail(roots: Roots, path: Path) -> str:
    """The last 64 KiB of a text file, from the start of a line; empty if there is no file that the
    page may read."""
    try:
        with roots.open(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
    except (OSError, UserError):
        return ""
    return text if size <= TAIL_BYTES else text.partition("\n")[2]
