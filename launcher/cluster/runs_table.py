"""A table of runs and their states, from the run folders and squeue. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from launcher.cluster import slurm_queue
from launcher.config import store
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.json_file import DamagedFile, is_count
from launcher.folders.links import LeadsOut
from launcher.folders.run import RunDir
from launcher.run import sweep
from launcher.run.metrics import PACE_STEPS, Glance, format_number
from launcher.run.status import (
    DAMAGED,
    NO_ATTEMPT,
    QueuedJob,
    find_runs,
    hung_reason,
    run_state,
    slurm_job_id,
    time_left,
    total_steps,
)

Row = dict[str, str]
T = TypeVar("T")


def format_table(folder: Path, without: str | None = None) -> str:
    """One line for each run in `folder`, or for the run that `folder` is; for a sweep, also the
    settings that differ.

    `without`: a job that squeue is not asked about, because it is ending and calls this. A damaged
    file is named in the line of its run.
    """
    runs = find_runs(folder) or [RunDir(folder)]
    looks = [_Look(run.newest_attempt()) for run in runs]
    jobs = [look.job for look in looks if look.job and look.job != without]
    try:
        queue = slurm_queue.query_queue(jobs)
    except UserError as error:  # the content of the folders is still useful
        print(error, file=sys.stderr)
        queue = {}
    readable = [look.config for look in looks if look.config]
    settings = iter(sweep.differing_settings(readable) if sweep.is_sweep(folder) else [])
    rows: list[Row] = []
    for look in looks:
        path = look.run.path
        row = {"run": path.absolute().name if path == folder else str(path.relative_to(folder))}
        rows.append({**row, **(next(settings, {}) if look.config else {}), **look.row(queue)})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def write_summary(folder: Path, without: str | None = None) -> str:
    """The table of a sweep, also written to its folder."""
    text = format_table(folder, without)
    manifest.write_text(folder / sweep.SUMMARY, text)
    return text


class _Look:
    """What the folder of a run says."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.damaged: list[str] = []  # what the column of this name says
        self.config = self._read(lambda: store.read_mapping(run.config))
        self.job = self._read(lambda: slurm_job_id(run))

    def row(self, queue: dict[str, QueuedJob]) -> Row:
        """The cells of its line."""
        queued = queue.get(self.job or "")
        state = self._read(lambda: run_state(self.run, queued)) or DAMAGED
        is_alive = queued is not None or state == "running"
        pace = PACE_STEPS if is_alive else 1
        seen = self._read(lambda: Glance.of(self.run.metrics, pace)) or Glance()
        if seen.is_damaged:
            self.damaged.append(self._name(self.run.metrics))
        max_steps = self.config["training"].get("max_steps") if self.config else None
        max_steps = max_steps if is_count(max_steps) else None
        total = self._read(lambda: total_steps(self.run, max_steps))
        is_unknown = any(each.startswith("metrics.jsonl") for each in self.damaged)
        step = seen.newest["step"] if seen.newest else "?" if is_unknown else 0
        best = seen.best_eval_loss
        return {
            "state": state,
            "attempt": str(self.run.attempt),
            "step": f"{step}{f'/{total}' if total else ''}",
            "loss": format_number(seen.newest, "loss", ".4f"),
            "eval_loss": "" if best is None else f"{best:.4f}",
            "left": time_left(seen.pace, total) if is_alive else "",
            "job": self.job or "",
            "nodes": queued.nodes if queued else "",
            "hung": self._read(lambda: hung_reason(self.run)) or "",
            "log": self._log() if state == NO_ATTEMPT else "",
            "damaged": ", ".join(dict.fromkeys(self.damaged)),
        }

    def _log(self) -> str:
        """The console of the job, which it has if no attempt has begun."""
        job = self.job
        return str(self._read(lambda: self.run.job_console(job)) or "") if job else ""

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.run.path))

    def _read(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; None if the file that it reads is damaged, which is kept in mind."""
        try:
            return read()
        except LeadsOut as error:
            self.damaged.append(f"{self._name(error.path)} leads out of the run folder")
        except DamagedFile as error:
            self.damaged.append(self._name(error.path))
        return None
