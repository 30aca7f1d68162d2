"""Reads run folders for the page: state, progress, charts, logs. Imports no torch."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launcher.cluster import slurm_queue
from launcher.config import Config, store
from launcher.errors import UserError
from launcher.folders.json_file import DamagedFile
from launcher.folders.links import LeadsOut
from launcher.folders.run import CONSOLE, RunDir
from launcher.run import processes, status
from launcher.run.curves import RunMetrics
from launcher.run.status import DAMAGED, QueuedJob, find_runs, slurm_job_id
from launcher.tracking import report
from launcher.ui import run_html
from launcher.ui.caches import CachedValue, LastUsed
from launcher.ui.i18n import Translations
from launcher.ui.jobs import Jobs, tail
from launcher.ui.roots import MAX_RECORD_BYTES, Roots

QUEUE_SECONDS = 5.0  # minimum time between queries of Slurm's queue
MAX_LOG_LINES = 300
KEPT_RUNS = 50  # whose curves and charts are kept
RECORD_SUFFIXES = (".json", ".yaml")
log = logging.getLogger("shardway.ui")

T = TypeVar("T")


@dataclass(frozen=True)
class CachedCharts:
    """The charts of a run. They are not drawn again before `expires`."""

    record_count: int
    html: str
    expires: float


@dataclass
class RunView:
    """What the page shows of a run."""

    name: str
    state: str
    html: str  # state, progress bar and facts
    metrics: RunMetrics | None = None  # None: they cannot be read

    @property
    def can_stop(self) -> bool:
        """Whether the run is running, starting or waiting in a queue."""
        return self.state not in run_html.ENDED


class Viewer:
    """Reads the runs in the first root. Caches what takes more than a few milliseconds."""

    def __init__(self, roots: Roots, jobs: Jobs) -> None:
        self.roots, self.jobs = roots, jobs
        self._queue = CachedValue(self._query_queue, QUEUE_SECONDS)
        self._metrics: LastUsed[Path, RunMetrics] = LastUsed(KEPT_RUNS)
        self._charts: LastUsed[Path, CachedCharts] = LastUsed(KEPT_RUNS)
        self._configs: LastUsed[tuple[Path, int, int], Config] = LastUsed(KEPT_RUNS)
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of all runs, newest first. Leaves out links to folders outside the roots."""
        return list(reversed(self._runs()))

    def _runs(self) -> dict[str, RunDir]:
        """Runs by name, oldest first."""
        if not self.roots.runs.is_dir():
            return {}
        runs = {}
        for run in find_runs(self.roots.runs):
            with suppress(UserError):
                self.roots.to_write(run.path)
                runs[str(run.path.relative_to(self.roots.runs))] = run
        return runs

    def run(self, name: str) -> RunDir:
        """The newest attempt of a run. Raises UserError if there is no run with this name."""
        if name not in (runs := self._runs()):
            raise UserError(f"runs/{name} is not a run")
        run = runs[name].newest_attempt()
        self._check_records(run)
        return run

    def _check_records(self, run: RunDir) -> None:
        """Raises UserError if a file that this process or a command reads from the run's folders
        lies outside the roots through a link, is a pipe or a device, or is too large."""
        for folder in (run.path, run.logs.parent, run.logs):
            if not self.roots.to_write(folder).is_dir():
                continue
            for entry in os.scandir(folder):
                path = Path(entry.path)
                is_plain = entry.is_file(follow_symlinks=False)
                if path == run.metrics:
                    if not is_plain:
                        self.roots.open(path).close()
                elif (path.suffix in RECORD_SUFFIXES or path == run.stop) and (
                    not is_plain or entry.stat().st_size > MAX_RECORD_BYTES
                ):
                    self.roots.check_record(path)

    def state(self, run: RunDir) -> str:
        """The state that `shardway runs` shows.

        In addition "starting" until there are ranks, and "unknown" while Slurm does not answer.
        """
        try:
            job_id = slurm_job_id(run)
        except DamagedFile:
            job_id = None
        queue = self._queue.get() if job_id else {}
        if job_id and queue and job_id in queue:
            return queue[job_id].state.lower()
        if processes.living(run):
            return "running"
        job = self.jobs.job(str(run.path.relative_to(self.roots.runs)))
        if job.is_running:  # the command of an attempt outlives its ranks for a moment
            has_ended = run.status.is_file() and _is_newer(run.status, job.record)
            return "running" if has_ended else "starting"
        if queue is None and (run.starting.is_file() or not run.status.is_file()):
            return "unknown"
        return status.run_state(run, None)

    def view(self, name: str, translate: Translations) -> RunView:
        """What the page shows of a run, also of one that is only starting.

        An error while reading the run is shown in its place: one broken folder must not hide the
        other runs.
        """
        try:
            run = self.run(name)
        except UserError as error:
            job = self.jobs.job(name)
            state = "starting" if job.is_running else "failed"
            values = {} if job.record.is_file() else {"error": str(error)}
            return RunView(name, state, run_html.run_card(name, state, values, None, translate))
        try:
            return self._view(name, run, translate)
        except Exception as error:
            log.info("%s cannot be shown", run.path, exc_info=True)
            values = {"error": f"{type(error).__name__}: {error}"}
            return RunView(
                name, "failed", run_html.run_card(name, "failed", values, None, translate)
            )

    def _view(self, name: str, run: RunDir, translate: Translations) -> RunView:
        """Damaged files are named; what the others say is shown."""
        errors: list[str] = []

        def read(call: Callable[[], T]) -> T | None:
            try:
                return call()
            except UserError as error:
                errors.append(str(error))
                return None

        state = read(lambda: self.state(run)) or DAMAGED
        config = read(lambda: self._config(run))
        job = read(lambda: slurm_job_id(run))
        max_steps = config.training.max_steps if config else None
        total = read(lambda: status.total_steps(run, max_steps))
        metrics = self.metrics(run)
        if metrics.bad_lines:
            errors.append(f"{run.metrics}: {metrics.bad_lines:,} lines are not records")
        values = run_html.facts(run, config, metrics, total, job)
        if errors:
            values["error"] = "; ".join(dict.fromkeys(errors))
        progress = run_html.progress(metrics, total)
        card = run_html.run_card(name, state, values, progress, translate)
        return RunView(name, state, card, metrics)

    def charts(self, view: RunView) -> str:
        """The charts of a run, as HTML. All windows share them.

        After a drawing that took t seconds, a live run's charts are not drawn again for 20·t.
        """
        if view.metrics is None:
            return ""
        path, count = self.roots.runs / view.name, view.metrics.count
        cached = self._charts.get(path)
        is_fresh = cached and time.monotonic() < cached.expires and view.can_stop
        if cached is None or (cached.record_count != count and not is_fresh):
            start = time.monotonic()
            charts = run_html.charts(view.metrics)
            end = time.monotonic()
            cached = CachedCharts(count, charts, end + 20 * (end - start))
            self._charts.put(path, cached)
        return cached.html

    def metrics(self, run: RunDir) -> RunMetrics:
        """What metrics.jsonl says."""
        with self._lock:
            metrics = self._metrics.get(run.path) or RunMetrics(
                run.metrics, open_file=self.roots.open
            )
            self._metrics.put(run.path, metrics)
            return metrics.update()

    def _config(self, run: RunDir) -> Config:
        file = run.config.stat()
        key = (run.path, file.st_mtime_ns, file.st_size)
        with self._lock:
            config = self._configs.get(key) or store.load(run.config)
            self._configs.put(key, config)
            return config

    def logs(self, name: str) -> dict[str, Path]:
        """The log files of a run by label: its console, and the log of every rank."""
        own = self.jobs.job(name).log
        files = {"console": own}
        if run := self._runs().get(name):
            run, path = run.newest_attempt(), run.path
            consoles = sorted(path.glob("logs/slurm-*.out"), key=lambda f: f.lstat().st_mtime)
            if consoles:
                files["slurm"] = consoles[-1]
            with suppress(LeadsOut):
                files |= {
                    _log_label(file): file
                    for file in sorted(run.logs.glob("*.log"))
                    # A run that the page started has the same text in both.
                    if file.name != CONSOLE or _is_newer(file, own, seconds=2)
                }
        return {label: file for label, file in files.items() if self.roots.is_readable(file)}

    def log(self, name: str, label: str) -> str:
        """The end of the log with this label, or of the first log if there is no such label."""
        files = self.logs(name)
        file = files.get(label) or next(iter(files.values()), None)
        lines = tail(self.roots, file).split("\n") if file else []
        # A progress bar overwrites its line after each \r: keep the last state.
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines[-MAX_LOG_LINES:])

    def compare(self, names: list[str]) -> str:
        """Charts of several runs and the settings that differ, like `shardway report`."""
        return report.render_body(report.read_runs([self.run(name).path for name in names]))

    def _query_queue(self) -> dict[str, QueuedJob] | None:
        """The jobs of all runs in Slurm's queue; None if Slurm does not answer."""
        job_ids = []
        for run in self._runs().values():
            # A damaged slurm.json, or one that is not in the roots.
            with suppress(OSError, UserError):
                self._check_records(run.newest_attempt())
                job_ids += [job_id] if (job_id := slurm_job_id(run)) else []
        try:
            return slurm_queue.query_queue(job_ids)
        except UserError:
            log.info("Slurm's queue cannot be read", exc_info=True)
            return None


def _is_newer(file: Path, other: Path, seconds: float = 0) -> bool:
    """Whether `file` was written at least `seconds` after `other`, or `other` does not exist."""
    if not other.is_file():
        return True
    return file.lstat().st_mtime > other.stat().st_mtime + seconds


def _log_label(file: Path) -> str:
    """`rank 3` for rank-3.log."""
    kind, _, number = file.stem.partition("-")
    return f"{kind} {int(number)}" if number.isdecimal() else file.stem
