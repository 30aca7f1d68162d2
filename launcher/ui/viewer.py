"""What run folders say, as the page shows it: state, progress, curves, logs. Imports no torch."""

from __future__ import annotations

import html
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from launcher import charts, overview, report
from launcher.charts import Curve
from launcher.cluster import slurm
from launcher.config import Config, store
from launcher.config.cluster import SlurmConfig
from launcher.errors import UserError
from launcher.run_dir import RunDir
from launcher.ui.places import Places
from launcher.ui.processes import Processes, tail
from launcher.ui.words import Words

SECONDS_OF_A_LOOK = 1.0  # at this machine's processes; several windows ask
SECONDS_OF_THE_QUEUE = 5.0
SHOWN_LINES = 300  # of a log
DRAWN = (  # title, field of metrics.jsonl
    ("loss per target token", "loss"),
    ("learning rate", "learning_rate"),
    ("tokens / s", "tokens_per_second"),
)
ENDED = ("finished", "stopped", "failed", "not started")
Records = list[dict[str, Any]]


T = TypeVar("T")


@dataclass
class Recalled(Generic[T]):
    """A value that is asked for anew only after some seconds. Safe between threads."""

    ask: Callable[[], T]
    seconds: float
    _value: T | None = None
    _until: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self) -> T:
        with self._lock:
            if self._value is None or time.monotonic() > self._until:
                self._value = self.ask()
                self._until = time.monotonic() + self.seconds
            return self._value


@dataclass
class Metrics:
    """The records of a run, of which only new lines are read. A new attempt writes a new file."""

    path: Path
    records: Records = field(default_factory=list)
    _inode: int = 0
    _at: int = 0

    def read(self) -> Records:
        """All of them. Lines that are none end the reading there."""
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


@dataclass
class Shown:
    """One run, as far as the page shows it."""

    name: str
    state: str
    facts: str  # HTML
    records: Records

    @property
    def lives(self) -> bool:
        """Whether it runs, is about to, or waits in a queue: one may stop it."""
        return self.state not in ENDED


class Viewer:
    """Looks at the runs of the first root. What costs more than a few milliseconds is recalled."""

    def __init__(self, places: Places, processes: Processes) -> None:
        self.places, self.processes = places, processes
        self._here = Recalled(overview.here, SECONDS_OF_A_LOOK)
        self._queue = Recalled(self._ask_queue, SECONDS_OF_THE_QUEUE)
        self._metrics: dict[Path, Metrics] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of all runs, the newest first."""
        if not self.places.runs.is_dir():
            return []
        found = overview.runs_in(self.places.runs)
        return [str(run.path.relative_to(self.places.runs)) for run in reversed(found)]

    def run(self, name: str) -> RunDir:
        """The newest attempt of a run. Raises UserError where there is none of that name."""
        path = self.places.run(name)
        if not (path / "config.yaml").is_file():
            raise UserError(f"runs/{name} is no run")
        return RunDir(path).newest()

    def state(self, run: RunDir) -> str:
        """As `shardway runs` has it; `starting` until ranks are there."""
        job = slurm.job_of(run)
        queued = self._queue.get().get(job) if job else None
        if queued is None and not run.status.is_file():
            if (str(run.path), run.attempt) in self._here.get():
                return "running"
            if self.processes.job(self._name(run)).lives:
                return "starting"
            return "failed" if run.attempt else "not started"
        return overview.state(run, queued)

    def show(self, name: str, words: Words) -> Shown:
        """A run by its name; one that is only just being started, too."""
        path = self.places.run(name)
        if not (path / "config.yaml").is_file():
            state = "starting" if self.processes.job(name).lives else "failed"
            return Shown(name, state, _facts(name, state, {}, None, words), [])
        run = self.run(name)
        state, records = self.state(run), self.records(run)
        try:
            config = store.load(run.config)
        except UserError as error:  # of another version, or written by hand
            return Shown(
                name, state, _facts(name, state, {"config.yaml": str(error)}, None, words), records
            )
        told = _told(run, config, records)
        return Shown(
            name, state, _facts(name, state, told, _share(run, config, records), words), records
        )

    def records(self, run: RunDir) -> Records:
        with self._lock:
            return self._metrics.setdefault(run.path, Metrics(run.metrics)).read()

    def logs(self, name: str) -> dict[str, Path]:
        """What can be read of a run: its console, and the log of every rank."""
        path = self.places.run(name)
        found = {"console": self.processes.job(name).log}
        if (path / "config.yaml").is_file():
            run = RunDir(path).newest()
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

    def _name(self, run: RunDir) -> str:
        return str(run.path.relative_to(self.places.runs))

    def _ask_queue(self) -> dict[str, slurm.Queued]:
        runs = overview.runs_in(self.places.runs) if self.places.runs.is_dir() else []
        try:
            return slurm.queue([job for run in runs if (job := slurm.job_of(run))])
        except UserError:  # the controller is busy: the folders still tell
            return {}


def curves(records: Records) -> str:
    """The charts of one run, as HTML."""
    found = []
    for title, name in DRAWN:
        points = [(line["step"], line[name]) for line in records if name in line]
        dots = [(line["step"], line["eval_loss"]) for line in records if "eval_loss" in line]
        if points:
            loss = name == "loss"
            found.append(charts.chart(title, [Curve(points, dots if loss else [], smoothed=loss)]))
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def _label(file: Path) -> str:
    return (
        file.stem.replace("rank-", "rank ").replace(" 0", " ") if "rank" in file.stem else file.stem
    )


def _share(run: RunDir, config: Config, records: Records) -> tuple[int, int] | None:
    """(steps done, steps in all)."""
    total = overview.total_steps(run, config)
    steps = [line["step"] for line in records[-50:] if "loss" in line]
    return (steps[-1] if steps else 0, total) if total else None


def _told(run: RunDir, config: Config, records: Records) -> dict[str, str]:
    """The facts of a run, in the words of the vocabulary."""
    steps = [line for line in records[-200:] if "loss" in line]
    evaluated = [line["eval_loss"] for line in records if "eval_loss" in line]
    newest = steps[-1] if steps else {}
    shown = {
        "model": config.model.name,
        "method": config.method.name,
        "strategy": config.strategy.name,
        "precision": config.precision.name,
        "attempt": str(run.attempt),
        "loss": f"{newest['loss']:.4f}" if "loss" in newest else "",
        "eval_loss": f"{evaluated[-1]:.4f}" if evaluated else "",
        "learning rate": f"{newest['learning_rate']:.2e}" if newest else "",
        "tokens / s": f"{newest['tokens_per_second']:,.0f}"
        if "tokens_per_second" in newest
        else "",
        "time left": overview.time_left(steps, overview.total_steps(run, config)),
        "job": (slurm.job_of(run) or "") if isinstance(config.cluster, SlurmConfig) else "",
    }
    return {key: value for key, value in shown.items() if value}


def _facts(
    name: str, state: str, told: dict[str, str], share: tuple[int, int] | None, words: Words
) -> str:
    """State, bar and facts of a run as HTML. All of it is text of ours or escaped."""
    if state in ENDED:
        told = {key: value for key, value in told.items() if key != "time left"}
    bar = ""
    if share:
        done, total = share
        width = f"width:{min(100.0, 100 * done / total):.1f}%"
        bar = (
            f'<div class="sw-bar" role="progressbar" aria-valuenow="{done}" '
            f'aria-valuemax="{total}"><div style="{width}"></div></div>'
            f'<div class="sw-steps">{html.escape(words("step"))} {done:,} / {total:,}</div>'
        )
    cells = "".join(
        f"<div><span>{html.escape(words(key))}</span><b>{html.escape(value)}</b></div>"
        for key, value in told.items()
    )
    badge = f'<em class="sw-state {html.escape(state.split()[0])}">{html.escape(words(state))}</em>'
    return (
        f'<div class="sw-run"><h3>{html.escape(name)} {badge}</h3>'
        f'{bar}<div class="sw-facts">{cells}</div></div>'
    )
