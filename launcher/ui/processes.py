"""Work that the page starts and that does not need the page: processes of their own, whose words go
to a file. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from launcher import manifest
from launcher.errors import UserError
from launcher.ui.places import Places

FOLDER = ".page"  # in runs/: what was started, and what it said
TAIL_BYTES = 1 << 16
# -P: what lies in the folder where it runs is not imported.
SHARDWAY = (sys.executable, "-P", "-m", "launcher.cli")


@dataclass(frozen=True)
class Job:
    """A process by the files that tell of it: `NAME.json`, `NAME.log`, and `NAME.out` where its
    stdout is kept apart. The server that started it may be gone."""

    folder: Path
    name: str

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name}.out"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def lives(self) -> bool:
        """Whether that process, and not another with its number, is running."""
        if not self.facts.is_file():
            return False
        facts = json.loads(self.facts.read_text())
        try:
            process = psutil.Process(facts["pid"])
            return (
                process.create_time() == facts["created"]
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False

    def stop(self) -> None:
        """Ask the process to end. One that has ended already is left alone."""
        if self.lives:
            with suppress(ProcessLookupError):
                os.kill(json.loads(self.facts.read_text())["pid"], signal.SIGTERM)

    def said(self) -> str:
        """The end of its log."""
        return tail(self.log)


@dataclass
class Processes:
    """Starts them, and takes leave of those that end while the server lives."""

    places: Places
    command: tuple[str, ...] = SHARDWAY
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.places.runs / FOLDER

    def job(self, name: str) -> Job:
        """The job of that name, whether or not there ever was one."""
        return Job(self.folder, name.replace("/", "+"))

    def start(self, name: str, words: list[str], apart: bool = False) -> Job:
        """Run `shardway WORDS` in the first root, in a session of its own: neither the end of this
        server nor Ctrl-C reaches it. `apart` keeps stdout in a file of its own.

        Raises UserError while a job of that name is running.
        """
        with self._lock:
            return self._start(self.job(name), words, apart)

    def _start(self, job: Job, words: list[str], apart: bool) -> Job:
        if job.lives:
            raise UserError(f"{job.name} is being worked on → wait until that has ended")
        job.folder.mkdir(parents=True, exist_ok=True)
        self.reap()
        out_file = job.out if apart else Path(os.devnull)
        with job.log.open("wb" if apart else "ab") as log, out_file.open("wb") as out:
            process = subprocess.Popen(
                [*self.command, *words],
                cwd=self.places.home,
                stdin=subprocess.DEVNULL,
                stdout=out if apart else log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._started.append(process)
        facts = {"words": words, "pid": process.pid, "created": _created(process.pid)}
        manifest.write_json(job.facts, facts)
        return job

    def ask(self, words: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Run `shardway WORDS` to its end. Raises UserError with what it says of what is wrong, and
        where it takes too long."""
        try:
            done = subprocess.run(
                [*self.command, *words],
                cwd=self.places.home,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"shardway {words[0]} took more than {seconds:.0f} s") from error
        if done.returncode:
            raise UserError(done.stderr.strip()[-2000:] or f"ended with {done.returncode}")
        return done

    def reap(self) -> None:
        """Let processes that have ended go."""
        self._started = [each for each in self._started if each.poll() is None]


def _created(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:  # it has ended already
        return None


def tail(path: Path) -> str:
    """The last 64 kB of a text file, from the beginning of a line; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text if size <= TAIL_BYTES else text.partition("\n")[2]
