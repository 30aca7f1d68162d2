"""What run folders say, as the page shows it: state, progress, curves, logs. Imports no torch."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from launcher import overview, report
from launcher.cluster import slurm
from launcher.config import store
from launcher.errors import UserError
from launcher.run_dir import RunDir
from launcher.ui import facts
from launcher.ui.facts import Records
from launcher.ui.places import Places
from launcher.ui.processes import Processes, tail
from launcher.ui.words import Words

SECONDS_OF_A_LOOK = 1.0  # at this machine's processes; several windows ask
SECONDS_OF_THE_QUEUE = 5.0
SHOWN_LINES = 300  # of a log
log = logging.getLogger("shardway.ui")


T = TypeVar("T")


@dataclass
class Recalled(Generic[T]):
    """A value that is asked for anew after some seconds, in a thread of its own: nobody waits for
    it but the first, and that one no longer than `patience`. None while it is not known."""

    ask: Callable[[], T]
    seconds: float
    patience: float = 1.0
    _value: T | None = None
    _until: float = 0.0
    _asking: threading.Thread | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> T | None:
        with self._lock:
            if time.monotonic() > self._until and not (self._asking and self._asking.is_alive()):
                self._asking = threading.Thread(target=self._renew, daemon=True)
                self._asking.start()
            asking = self._asking
        if self._value is None and asking:
            asking.join(self.patience)
        return self._value

    def _renew(self) -> None:
        value = self.ask()
        self._value, self._until = value, time.monotonic() + self.seconds


@dataclass
class Metrics:
    """The records of a run, of which only new lines are read. A new attempt writes a new file."""

    path: Path
    records: Records = field(default_factory=list)
    _inode: int = 0
    _at: int = 0

    def read(self) -> Records:
        """All of them, without lines that are none."""
        try:
            with self.path.open("rb") as file:
                if (inode := self.path.stat().st_ino) != self._inode:
                    self.records, self._inode, self._at = [], inode, 0
                file.seek(self._at)
                new = file.read()
        except OSError:
            return self.records
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                int(record["step"])
            except (ValueError, TypeError, KeyError):
                continue
            self.records.append(record)
        return self.records


@dataclass(frozen=True)
class Drawn:
    """Charts of a run that had so many records, not drawn anew before `until`."""

    count: int
    html: str
    until: float


@dataclass
class Shown:
    """One run, as far as the page shows it."""

    name: str
    state: str
    html: str  # state, bar and facts
    records: Records

    @property
    def lives(self) -> bool:
        """Whether it runs, is about to, or waits in a queue: one may stop it."""
        return self.state not in facts.ENDED


class Viewer:
    """Looks at the runs of the first root. What costs more than a few milliseconds is recalled."""

    def __init__(self, places: Places, processes: Processes) -> None:
        self.places, self.processes = places, processes
        self._here = Recalled(overview.here, SECONDS_OF_A_LOOK)
        self._queue = Recalled(self._ask_queue, SECONDS_OF_THE_QUEUE)
        self._metrics: dict[Path, Metrics] = {}
        self._drawn: dict[Path, Drawn] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of all runs, the newest first. One that a link puts outside the roots is none."""
        return list(reversed(self._found()))

    def _found(self) -> dict[str, RunDir]:
        if not self.places.runs.is_dir():
            return {}
        found = {}
        for run in overview.runs_in(self.places.runs):
            with suppress(UserError):
                self.places.to_write(run.path)
                found[str(run.path.relative_to(self.places.runs))] = run
        return found

    def run(self, name: str) -> RunDir:
        """The newest attempt of a run. Raises UserError where there is none of that name."""
        if name not in (found := self._found()):
            raise UserError(f"runs/{name} is no run")
        return found[name].newest()

    def state(self, run: RunDir) -> str:
        """As `shardway runs` has it; `starting` until ranks are there, `unknown` while Slurm does
        not answer."""
        number = slurm.job_of(run)
        queue = self._queue.get() if number else {}
        if number and queue and number in queue:
            return queue[number].state.lower()
        if (str(run.path), run.attempt) in (self._here.get() or ()):
            return "running"
        job = self.processes.job(str(run.path.relative_to(self.places.runs)))
        if job.lives:  # an attempt that has ended keeps its command for a moment
            over = run.status.is_file() and _is_newer(run.status, job.facts)
            return "running" if over else "starting"
        if not run.status.is_file() and queue is None:
            return "unknown"
        return overview.state(run, None)

    def show(self, name: str, words: Words) -> Shown:
        """A run by its name; one that is only just being started, too. What cannot be read of it is
        said in its place: one odd folder keeps nobody from the others."""
        try:
            run = self.run(name)
        except UserError as error:
            job = self.processes.job(name)
            lives = job.facts.is_file() and job.lives
            told = {} if job.facts.is_file() else {"error": str(error)}
            state = "starting" if lives else "failed"
            return Shown(name, state, facts.facts(name, state, told, None, words), [])
        try:
            state, records = self.state(run), self.records(run)
            config = store.load(run.config)
            told, share = facts.told(run, config, records), facts.share(run, config, records)
        except Exception as error:
            log.info("%s cannot be shown", run.path, exc_info=True)
            said = {"error": f"{type(error).__name__}: {error}"}
            return Shown(name, "failed", facts.facts(name, "failed", said, None, words), [])
        return Shown(name, state, facts.facts(name, state, told, share, words), records)

    def curves(self, shown: Shown) -> str:
        """The charts of a run, as HTML: drawn once for all windows, those of long runs seldom."""
        path, count = self.places.runs / shown.name, len(shown.records)
        drawn = self._drawn.get(path)
        rests = drawn and time.monotonic() < drawn.until and shown.lives
        if drawn is None or (drawn.count != count and not rests):
            began = time.monotonic()
            drawn_now = facts.curves(shown.records)
            now = time.monotonic()
            drawn = self._drawn[path] = Drawn(count, drawn_now, now + 20 * (now - began))
        return drawn.html

    def records(self, run: RunDir) -> Records:
        with self._lock:
            return self._metrics.setdefault(run.path, Metrics(run.metrics)).read()

    def logs(self, name: str) -> dict[str, Path]:
        """What can be read of a run: its console, and the log of every rank."""
        found = {"console": self.processes.job(name).log}
        if run := self._found().get(name):
            run, path = run.newest(), run.path
            consoles = sorted(path.glob("logs/slurm-*.out"), key=lambda f: f.stat().st_mtime)
            if consoles:
                found["slurm"] = consoles[-1]
            found |= {_label(file): file for file in sorted(run.logs.glob("*.log"))}
        return {label: file for label, file in found.items() if file.is_file()}

    def log(self, name: str, label: str) -> str:
        """The end of one of them; of the first where there is none of that label."""
        found = self.logs(name)
        file = found.get(label) or next(iter(found.values()), None)
        lines = tail(file).split("\n") if file else []
        # A bar writes itself anew over its line: the last of it counts.
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines[-SHOWN_LINES:])

    def compare(self, names: list[str]) -> str:
        """Curves and differing settings of several runs, as `shardway report` has them."""
        return report.body(report.read([self.run(name).path for name in names]))

    def _ask_queue(self) -> dict[str, slurm.Queued] | None:
        """None where Slurm does not answer."""
        jobs = []
        for run in self._found().values():
            with suppress(ValueError, KeyError, TypeError, OSError):  # an odd slurm.json
                jobs += [job] if (job := slurm.job_of(run)) else []
        try:
            return slurm.queue(jobs)
        except UserError:
            log.info("the queue cannot be asked", exc_info=True)
            return None


def _is_newer(file: Path, than: Path) -> bool:
    return file.stat().st_mtime > than.stat().st_mtime


def _label(file: Path) -> str:
    kind, _, number = file.stem.partition("-")
    return f"{kind} {int(number)}" if number.isdecimal() else file.stem
