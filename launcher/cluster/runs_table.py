"""A table of runs and their states, from the run folders and squeue. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.cluster import slurm
from launcher.config import Config, store
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.folders.run import RunDir
from launcher.run import sweep
from launcher.run.status import (
    NO_ATTEMPT,
    QueuedJob,
    find_runs,
    read_metrics,
    run_state,
    slurm_job_id,
    time_left,
    total_steps,
)

Row = dict[str, str]


def format_table(folder: Path, without: str | None = None) -> str:
    """One line for each run in `folder`; for a sweep, also the settings that differ.

    `without`: a job that squeue is not asked about, because it is ending and calls this.
    """
    runs = find_runs(folder)
    configs = [_load_config(run) for run in runs]
    jobs = [job for run in runs if (job := slurm_job_id(run)) and job != without]
    try:
        queue = slurm.query_queue(jobs)
    except UserError as error:  # the content of the folders is still useful
        print(error, file=sys.stderr)
        queue = {}
    readable = [config for config in configs if config]
    settings = iter(sweep.differing_settings(readable) if sweep.is_sweep(folder) else [])
    rows: list[Row] = []
    for run, config in zip(runs, configs, strict=True):
        row = {"run": str(run.path.relative_to(folder))}
        if config is None:
            rows.append({**row, "state": "config.yaml is of another version"})
        else:
            rows.append({**row, **next(settings, {}), **_row(run.newest_attempt(), config, queue)})
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


def _load_config(run: RunDir) -> Config | None:
    """None if this version of Shardway cannot read it."""
    try:
        return store.load(run.config)
    except UserError:
        return None


def _row(run: RunDir, config: Config, queue: dict[str, QueuedJob]) -> Row:
    job = slurm_job_id(run) or ""
    queued = queue.get(job)
    records = read_metrics(run)
    steps = [record for record in records if "loss" in record]
    evaluations = [record["eval_loss"] for record in records if "eval_loss" in record]
    total = total_steps(run, config)
    step = f"{steps[-1]['step'] if steps else 0}{f'/{total}' if total else ''}"
    state = run_state(run, queued)
    return {
        "state": state,
        "attempt": str(run.attempt),
        "step": step,
        "loss": f"{steps[-1]['loss']:.4f}" if steps else "",
        "eval_loss": f"{min(evaluations):.4f}" if evaluations else "",
        "left": time_left(steps, total) if queued or state == "running" else "",
        "job": job,
        "nodes": queued.nodes if queued else "",
        "log": str(run.job_console(job)) if state == NO_ATTEMPT else "",
    }
