"""Where runs stand: a table of run folders. Read from the folders, and from squeue; no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil

from launcher import manifest, sweep
from launcher.cluster import slurm
from launcher.config import Config, store
from launcher.errors import UserError
from launcher.run_dir import RunDir

Row = dict[str, str]


def runs_in(folder: Path) -> list[RunDir]:
    """The runs of a sweep in their order, else all in `folder` and its sweeps, the newest last."""
    if sweep.is_sweep(folder):
        return sweep.elements(folder)
    found = [RunDir(file.parent) for file in folder.glob("*/config.yaml")]
    found += [
        run for index in folder.glob(f"*/{sweep.INDEX}") for run in sweep.elements(index.parent)
    ]
    return sorted(found, key=lambda run: run.config.stat().st_mtime)


def table(folder: Path, without: str | None = None) -> str:
    """A line for each run of `folder`; of a sweep with the settings that differ.

    `without` names a job that the queue is not asked about: the one that asks, at its end.
    """
    runs = runs_in(folder)
    configs = [_config(run) for run in runs]
    jobs = [job for run in runs if (job := slurm.job_of(run)) and job != without]
    try:
        queue = slurm.queue(jobs)
    except UserError as error:  # what the folders say is worth reading all the same
        print(error, file=sys.stderr)
        queue = {}
    told = iter(sweep.differing([c for c in configs if c]) if sweep.is_sweep(folder) else [])
    rows: list[Row] = []
    for run, config in zip(runs, configs, strict=True):
        row = {"run": str(run.path.relative_to(folder))}
        if config is None:
            rows.append({**row, "state": "config.yaml is of another version"})
        else:
            rows.append({**row, **next(told, {}), **_row(run.newest(), config, queue)})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return "".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def summarise(folder: Path, without: str | None = None) -> str:
    """The table of a sweep, which is also left in its folder."""
    text = table(folder, without)
    manifest.write_text(folder / sweep.SUMMARY, text)
    return text


def state(run: RunDir, queued: slurm.Queued | None) -> str:
    """Slurm's word while there is a job; else how the newest attempt ended."""
    if queued:
        return queued.state.lower()
    if run.status.is_file():
        return str(json.loads(run.status.read_text())["state"])
    return "running" if is_here(run) else "failed" if run.attempt else "not started"


def metrics(run: RunDir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, none where it is not there yet. Raises UserError for one that is
    no record."""
    if not run.metrics.is_file():
        return []
    found = []
    lines = run.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("}"):
            break  # it is being written
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{run.metrics}, line {number} is no record: {error}") from error
        found.append(record)
    return found


def is_here(run: RunDir) -> bool:
    """Whether ranks of the newest attempt are on this machine."""
    return (str(run.path), run.attempt) in here()


def here() -> set[tuple[str, int]]:
    """(folder, attempt) of every run that has ranks on this machine."""
    lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return {
        (path, int(attempt))
        for *_, module, path, attempt in (line[-3:] for line in lines if len(line) > 2)
        if module == "launcher.worker" and attempt.isdigit()
    }


def total_steps(run: RunDir, config: Config) -> int | None:
    """Steps of the whole training; None while nothing but epochs is known of it."""
    if run.steps.is_file():
        return int(json.loads(run.steps.read_text())["total_steps"])
    return config.training.max_steps


def _config(run: RunDir) -> Config | None:
    """None where this version cannot read it."""
    try:
        return store.load(run.config)
    except UserError:
        return None


def _row(run: RunDir, config: Config, queue: dict[str, slurm.Queued]) -> Row:
    job = slurm.job_of(run) or ""
    queued = queue.get(job)
    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    total = total_steps(run, config)
    step = f"{steps[-1]['step'] if steps else 0}{f'/{total}' if total else ''}"
    now = state(run, queued)
    return {
        "state": now,
        "attempt": str(run.attempt),
        "step": step,
        "loss": f"{steps[-1]['loss']:.4f}" if steps else "",
        "eval_loss": f"{min(evaluations):.4f}" if evaluations else "",
        "left": time_left(steps, total) if queued or now == "running" else "",
        "job": job,
        "nodes": queued.nodes if queued else "",
    }


def time_left(steps: list[dict[str, Any]], total: int | None) -> str:
    """Of the last hundred steps' pace."""
    recent = steps[-100:]
    if total is None or len(recent) < 2:
        return ""
    pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    seconds = int(pace * (total - recent[-1]["step"]))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
